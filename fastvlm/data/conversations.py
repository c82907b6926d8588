"""Questions about pictures: a folder of pictures, a LLaVA-format JSON or JSONL file, or the demo set."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm.common.documents import Unreadable, loads
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_text
from fastvlm.data import pictures, scenes
from fastvlm.data.images import open_image
from fastvlm.data.prompt import IMAGE

QUESTION = "Describe the image."  # asked about a picture that comes without one
# A record's key, and a mark in its text, for another medium than one picture: without it, the question would be asked
# about nothing.
_MEDIUM = r"video|audio|sound|speech|voice|point_?cloud|depth"
_MEDIUM_KEY = re.compile(rf"(?:(?:{_MEDIUM}|image(?=.))s?)(?:_?(?:path|file|url|clip)s?)?|images", re.IGNORECASE)
_MEDIUM_MARK = re.compile(rf"<\|?(?:{_MEDIUM}|vision|image)[\w-]*\|?>", re.IGNORECASE)
_LARGEST = 2 << 30  # bytes of a file of records; LLaVA's own, of 665,000 questions, has 1 GB
_SHOWN = 10  # faults of a file that its error names; a long file may have thousands


@dataclass(frozen=True)
class Sample:
    """One question. `image()` opens its picture as RGB (UserError for a file that is none); None: text alone."""

    name: str
    image: Callable[[], Image.Image] | None
    question: str
    answer: str | None


def load(path: str | Path, image_folder: str | Path | None = None) -> list[Sample]:
    """Read the questions of a folder of pictures, or of a LLaVA-format file. `check` opens their pictures.

    Records are {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}; other keys are ignored, but one
    of another medium (`video`, `images`) is a fault, as is its mark in the text (`<video>`). The first question counts
    and, where one follows, its answer. A record without `image` is text alone.

    Args:
        path: a folder of pictures (`QUESTION` is asked about each), or a .json or .jsonl file.
        image_folder: the folder that records' `image` is relative to; None: the file's.

    Returns:
        The questions, in the order of the file or of the pictures' names.

    Raises:
        UserError: the path holds no questions, or a record has faults; the message names those of all records.
    """
    path = Path(path)
    if path.is_dir():
        return [Sample(file.name, partial(open_image, file), QUESTION, None) for file in pictures.files(path, "folder")]
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise UserError(
            f"{path}: {'not questions' if path.exists() else 'no such file or folder'}:"
            " expected a folder of pictures, or a LLaVA-format .json or .jsonl file"
        )
    folder, samples, faults = Path(image_folder or path.parent), [], []
    for where, record in _records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            samples.append(_sample(record, where, folder))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        _refuse(str(path), faults)
    if not samples:
        raise UserError(f"{path}: no questions in it: expected LLaVA-format records")
    return samples


def check(samples: Iterable[Sample]) -> None:
    """Open every picture once before the work starts; UserError that names all that can't be used."""
    faults = []
    for sample in samples:
        try:
            if sample.image is not None:
                sample.image()
        except UserError as error:
            faults.append(str(error))
    if faults:
        _refuse("pictures", faults)


def demo_samples(count: int, split: str = "test") -> list[Sample]:
    """The demo set's first `count` questions with their answers; `split` is "train" or "test"."""
    return [
        Sample(f"{entry.kind} {number}", partial(_same, entry.image), entry.question, entry.answer)
        for number, entry in enumerate(scenes.questions(count, split=split))
    ]


def drawn_samples(count: int) -> list[Sample]:
    """`QUESTION` about drawn scenes, for a checkpoint that doesn't speak the demo's language."""
    return [
        Sample(f"drawn {number}", partial(_same, image), QUESTION, None)
        for number, image in enumerate(pictures.drawn(count))
    ]


def _same(image: Image.Image) -> Image.Image:
    return image


def _refuse(what: str, faults: list[str]) -> None:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise UserError(f"{what}: {'; '.join(faults[:_SHOWN])}{more}")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record with its place ("line 3", "record 3", from 1); a line that is no JSON as its ValueError."""
    try:
        text = read_text(path, _LARGEST, "utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    if path.suffix == ".jsonl":
        # not splitlines(), which parts at U+2028 too, which JSON allows inside a string
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(line)
        return
    records = _parsed(text)
    if isinstance(records, Unreadable):
        raise UserError(str(records.finding(str(path))))
    if not isinstance(records, list):
        raise UserError(f"{path}: got {_kind(records)}, expected a list of LLaVA-format records")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _parsed(text: str) -> Any:
    try:
        return loads(text)
    except Unreadable as error:
        return error


def _sample(record: Any, where: str, folder: Path) -> Sample:
    """The question of a record. Raises ValueError with all of the record's faults."""
    if not isinstance(record, dict):
        raise ValueError(f"got {_kind(record)}, expected an object with conversations")
    others = [key for key, value in record.items() if value not in (None, "", []) and _MEDIUM_KEY.fullmatch(key)]
    faults = [f"{key}: a record is of one picture (image) or of text alone; leave it out" for key in others]
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        faults.append(f"image: got {_kind(image)}, expected one file's name")
    elif image is not None and not (folder / image).is_file():
        faults.append(f"image: no such file: {folder / image}")
    turns = record.get("conversations")
    texts: list[str] = []
    if not isinstance(turns, list) or not turns:
        faults.append('conversations: expected a list of {"from", "value"}, a question first')
    else:
        for speaker, turn in zip(("human", "gpt"), turns):
            value = turn.get("value") if isinstance(turn, dict) else None
            if not isinstance(value, str) or turn.get("from") != speaker:
                faults.append(f'conversations: expected {{"from": "{speaker}", "value": text}}, got {_short(turn)}')
            else:
                texts.append(value)
    marks = {mark: None for text in texts for mark in _MEDIUM_MARK.findall(text) if mark != IMAGE}
    faults += [f"conversations: {mark}: only {IMAGE} can stand in a text; leave the record out" for mark in marks]
    question = texts[0].replace(IMAGE, "").strip() if texts else ""
    if texts and not question:
        faults.append(f"conversations: no question besides {IMAGE}")
    if texts and image is None and IMAGE in texts[0]:
        faults.append(f"conversations: {IMAGE} in the question of a record without image")
    if faults:
        raise ValueError(", ".join(faults))
    opener = None if image is None else partial(open_image, folder / image)
    return Sample(str(record.get("id", where)), opener, question, texts[1].strip() if len(texts) > 1 else None)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
