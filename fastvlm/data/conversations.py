"""Questions about pictures: a folder of pictures, a file of records, or the demo set."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from fastvlm.common.errors import UserError
from fastvlm.common.findings import several
from fastvlm.data import pictures, scenes
from fastvlm.data.images import open_image
from fastvlm.data.prompt import IMAGE
from fastvlm.data.records import QUESTION, Record, read_records


@dataclass(frozen=True)
class Sample:
    """One question. `image()` opens its picture as RGB (UserError for a file that is none); None: text alone."""

    name: str
    image: Callable[[], Image.Image] | None
    question: str
    answer: str | None


def load(path: str | Path, image_folder: str | Path | None = None) -> list[Sample]:
    """Read the questions of a folder of pictures, or of a file of records. `check` opens their pictures.

    The first question of a record counts and, where one follows, its answer. A record without picture is text alone.

    Args:
        path: a folder of pictures (`QUESTION` is asked about each), or a file as `records.read_records` takes it.
        image_folder: the folder that records' pictures are relative to; None: the file's.

    Returns:
        The questions, in the order of the file or of the pictures' names.

    Raises:
        UserError: the path holds no questions, or a record has faults; the message names those of all records.
    """
    path = Path(path)
    if path.is_dir():
        return [Sample(file.name, partial(open_image, file), QUESTION, None) for file in pictures.files(path, "folder")]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: expected a folder of pictures, or a file of records")
    records = read_records(path, Path(image_folder) if image_folder else None, questions=True)
    return [_sample(record) for record in records]


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
        raise UserError(f"pictures: {several(faults)}")


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


def _sample(record: Record) -> Sample:
    """The first question of a record that `read_records` found fit to ask."""
    opener = partial(open_image, record.images[0]) if record.images else None
    question, *answer = [turn.text.replace(IMAGE, "").strip() for turn in record.turns if turn.role != "system"]
    return Sample(record.name, opener, question, answer[0] if answer else None)
