"""Training data: conversations about pictures, read from the formats that people have; every fault of a file at once.

A file is read here alone: questions for evaluation and calibration (`conversations`) are the same records.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fastvlm.common.documents import shown
from fastvlm.common.errors import UserError
from fastvlm.common.findings import several
from fastvlm.data import pictures
from fastvlm.data.prompt import IMAGE, SYSTEM, images_first
from fastvlm.data.record_files import SUFFIXES, kind_of, rows

QUESTION = "Describe the image."  # asked about a picture that comes without one
# Each format's keys: of the turns in a record; of the speaker and the text in a turn; and its names of the roles.
_DIALOGUES = {
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"}),
    "messages": ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"}),
}
_PICTURE_COLUMNS = ("image", "file_name", "filename", "file", "image_path")
_CAPTION_COLUMNS = ("caption", "text", "answer")
_QUESTION_COLUMNS = ("question", "prompt")
# A record's key, and a mark in its text, for another medium than pictures: without it, the question would be asked
# about nothing.
_MEDIUM = r"video|audio|sound|speech|voice|point_?cloud|depth"
_MEDIUM_KEY = re.compile(rf"(?:(?:{_MEDIUM}|image(?=.))s?)(?:_?(?:path|file|url|clip)s?)?|images", re.IGNORECASE)
# The chat template's own tokens: in a text they end its turn, and the original implementation's masks go wrong.
_CONTROL = re.compile(r"(?-i:<\|(?:im_start|im_end|endoftext)\|>)")
_MARK = re.compile(rf"<\|?(?:{_MEDIUM}|vision|image)[\w-]*\|?>|{_CONTROL.pattern}", re.IGNORECASE)
# Keys of other trainers that change what is learnt: of a record, and of a turn with the value that changes nothing.
_CHANGES = {"tools", "objects", "rejected_response", "system"}
_TURN_CHANGES = {"tool_calls": None, "function_call": None, "weight": 1, "loss": True, "train": True}


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is "system", "user" or "assistant"; `<image>` in `text` is a picture's place."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation as the model reads it: an optional system turn, then questions and answers by turns.

    `name` is its id, or its place in the file; `images` are in the order of their places in the texts.
    """

    name: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


def read_records(path: Path, image_folder: Path | None = None, questions: bool = False) -> list[Record]:
    """Read LLaVA-format conversations, `messages` or captions. `check` opens their pictures; docs/FINETUNE.md has more.

    Args:
        path: a .json or .jsonl file of any of the formats, or a .csv file of captions.
        image_folder: the folder that pictures are relative to; None: the file's.
        questions: for questions, not for training: the first one needs no answer, and is about one picture at most.

    Returns:
        The records, in the order of the file.

    Raises:
        UserError: the file holds no records, or some have faults; the message names those of all records.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        what = "a file of another kind" if path.is_file() else "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}: expected a file of records, {', '.join(SUFFIXES)}")
    folder, records, faults = Path(image_folder or path.parent), [], []
    for where, row in rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            records.append(_record(row, where, folder, questions))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise UserError(f"{path}: {several(faults)}")
    if not records:
        raise UserError(f"{path}: no records in it: expected conversations, messages or captions")
    return records


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced: a file may be sorted."""
    count = min(most, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def check(records: Iterable[Record]) -> None:
    """Open every picture once before the work starts; UserError that names all that can't be used."""
    pictures.check(dict.fromkeys(path for record in records for path in record.images))


def question_faults(record: Record) -> list[str]:
    """Why a record can't be asked, only learnt from: the exported model takes one picture, in front of its question."""
    faults = []
    question = next((turn.text for turn in record.turns if turn.role == "user"), None)
    if len(record.images) > 1:
        faults.append(f"{len(record.images)} pictures, expected one at most, which the exported model takes")
    elif record.images and question is not None and IMAGE not in question:
        faults.append("the picture stands in a later question, and only the first is asked")
    if record.turns and record.turns[0].role == "system" and record.turns[0].text != SYSTEM:
        faults.append(f"a system turn of its own, which is never asked with: expected {shown(SYSTEM)}, or none")
    if question is not None and not question.replace(IMAGE, "").strip():
        faults.append(f"no question besides {IMAGE}")
    return faults


def as_llava(record: Record) -> dict[str, Any]:
    """The record in the LLaVA format, pictures by absolute path, so that `read_records` gives an equal one."""
    names = {role: name for name, role in _DIALOGUES["conversations"][2].items()}
    paths = [str(path.absolute()) for path in record.images]
    image = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in record.turns]
    return {"id": record.name, **image, "conversations": turns}


def _record(row: Any, where: str, folder: Path, questions: bool) -> Record:
    """A record of any format. Raises ValueError with all of its faults."""
    if not isinstance(row, dict):
        raise ValueError(f"got {kind_of(row)}, expected an object with conversations, messages or a caption")
    faults: list[str] = []
    keys = [key for key in _DIALOGUES if key in row]
    inline: list[Any] = []
    if len(keys) > 1:
        raise ValueError(f"both {' and '.join(keys)}: leave one out")
    if keys:
        allowed: tuple[str, ...] = ("images",)
        named = [key for key in ("image", "images") if row.get(key) not in (None, [])]
        if len(named) > 1:
            faults.append("both image and images: a record has one of them; leave the other out")
        given = row[named[0]] if named else []
        turns = _turns(row[keys[0]], keys[0], inline, faults)
        _check_order(turns, row[keys[0]], keys[0], questions, faults)
        if inline and named:
            faults.append(f"{named[0]}: pictures in the contents, too: leave one out")
    else:
        allowed = _PICTURE_COLUMNS
        turns, given = _caption(row, faults)
    images = [_image(item, folder, faults) for item in inline or (given if isinstance(given, list) else [given])]
    _check_content(row, allowed, turns, faults)
    turns = _place(turns, len(images), faults)
    name = row.get("id")
    record = Record(str(where if name is None else name), tuple(path for path in images if path), tuple(turns))
    if questions:
        faults += question_faults(record)
    if faults:
        raise ValueError(", ".join(faults))
    return record


def _check_content(row: dict[str, Any], allowed: Iterable[str], turns: list[Turn], faults: list[str]) -> None:
    """Add faults about what would be left out or misread: other media, other trainers' keys, the template's tokens."""
    for key, value in row.items():
        if value in (None, "", []) or key in allowed:
            continue
        if _MEDIUM_KEY.fullmatch(key):
            faults.append(f"{key}: only pictures (image or images) can be learnt from; leave the record out")
        elif key in _CHANGES:
            faults.append(f"{key}: not supported{'; make it the first turn' if key == 'system' else ''}")
    marks = dict.fromkeys(mark for turn in turns for mark in _MARK.findall(turn.text) if mark != IMAGE)
    for mark in marks:
        if _CONTROL.fullmatch(mark):
            faults.append(f"{mark}: the chat template's own token in a text; leave it out")
        else:
            faults.append(f"{mark}: only {IMAGE} can stand in a text; leave the record out")


def _turns(value: Any, key: str, inline: list[Any], faults: list[str]) -> list[Turn]:
    """The turns that can be read; pictures that stand in the contents themselves are added to `inline`."""
    speaker, content, roles = _DIALOGUES[key]
    if not isinstance(value, list) or not value:
        faults.append(f'{key}: expected a list of {{"{speaker}", "{content}"}}, a question first')
        return []
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"{key} {number}"
        text = turn.get(content) if isinstance(turn, dict) else None
        if isinstance(text, list) and key == "messages":
            text = _joined(text, where, inline, faults)
        if not isinstance(turn, dict) or not isinstance(text, str) or not isinstance(turn.get(speaker), str):
            faults.append(
                f'{where}: expected {{"{speaker}": {" or ".join(roles)}, "{content}": text}}, got {shown(turn)}'
            )
        elif turn[speaker] not in roles:
            faults.append(f"{where}: unknown role {shown(turn[speaker])}, expected {' or '.join(roles)}")
        else:
            if not text.strip():
                faults.append(f"{where}: an empty text")
            turns.append(Turn(roles[turn[speaker]], text))
            for name in sorted(turn.keys() & _TURN_CHANGES):
                if turn[name] not in (None, _TURN_CHANGES[name], []):
                    faults.append(f"{where}: {name}: not supported; leave it out")
    return turns


def _joined(parts: list[Any], where: str, inline: list[Any], faults: list[str]) -> str:
    """A list of parts as text: its pictures come first, as in `prompt.CHAT_TEMPLATE`."""
    texts, places = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            places += 1
            sources = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key)]
            inline += [source.get("url", source) if isinstance(source, dict) else source for source in sources[:1]]
        else:
            faults.append(f"{where}: {shown(part)}: expected a part of type text, image or image_url")
    return (IMAGE + "\n") * places + "".join(texts)


def _check_order(turns: list[Turn], value: Any, key: str, questions: bool, faults: list[str]) -> None:
    """Add a fault where questions and answers don't take turns, or the last question has no answer."""
    if not turns or len(turns) != len(value):  # what is left of faulty turns has no order
        return
    names = {role: name for name, role in _DIALOGUES[key][2].items()}
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            place = len(turns) - len(spoken) + number + 1
            faults.append(f"{key} {place}: got {names[turn.role]}, expected {names[expected]}: a question first, then"
                          " questions and answers by turns")  # fmt: skip
            return
    if not spoken or (len(spoken) % 2 and not questions):
        faults.append(f"{key}: no {'answer to the last question' if spoken else 'question'}")


def _caption(row: dict[str, Any], faults: list[str]) -> tuple[list[Turn], Any]:
    """The question and its answer in a row of columns, and the picture."""
    picture = _column(row, "picture", _PICTURE_COLUMNS, faults) or []
    answer = _column(row, "caption", _CAPTION_COLUMNS, faults)
    question = _column(row, "question", _QUESTION_COLUMNS, faults, QUESTION)
    turns = [("user", question), ("assistant", answer)]
    for role, text in turns:
        if text is not None and (not isinstance(text, str) or not text.strip()):
            faults.append(f"{'caption' if role == 'assistant' else 'question'}: got {kind_of(text)}, expected text")
    return [Turn(role, text) for role, text in turns if isinstance(text, str)], picture


def _column(row: dict[str, Any], what: str, columns: Iterable[str], faults: list[str], default: Any = None) -> Any:
    """The value of the one column of these names that is filled; `default`, a fault where it is None, if none is."""
    filled = [column for column in columns if row.get(column) not in (None, "")]
    if len(filled) == 1 or (not filled and default is not None):
        return row[filled[0]] if filled else default
    got = " and ".join(filled) or f"the keys {', '.join(map(shown, row)) or '(none)'}"
    faults.append(f"{what}: expected one of {', '.join(columns)}, got {got}")
    return None


def _image(name: Any, folder: Path, faults: list[str]) -> Path | None:
    """The file of a picture: relative names stay inside the folder, an absolute one is taken as it is."""
    if isinstance(name, dict) and name.get("bytes") is None:  # as Hugging Face's datasets write a picture
        name = name.get("path")
    if not isinstance(name, str) or not name:
        faults.append(f"image: got {kind_of(name)}, expected a file's name, or a list of them")
        return None
    name = name.removeprefix("file://")
    if re.match(r"[a-z]+://|data:", name, re.IGNORECASE):
        faults.append(f"image: {shown(name)}: a URL, expected a file: save the picture first")
        return None
    if ".." in PurePath(name).parts:
        faults.append(f"image: {shown(name)}: leaves the folder of pictures by ..: give its absolute path")
        return None
    path = folder / name
    try:
        there = path.is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        faults.append(f"image: no such file: {path}")
    return path


def _place(turns: list[Turn], images: int, faults: list[str]) -> list[Turn]:
    """The turns with a place for each picture, as the original implementation has them: one picture stands in front
    of its turn, without blanks around the rest; several stand where the texts name them, without change."""
    places = sum(turn.text.count(IMAGE) for turn in turns)
    if places and places != images:
        faults.append(f"{places} {IMAGE} in the texts for {images} picture(s): name each picture once, or none")
    if any(IMAGE in turn.text for turn in turns if turn.role != "user"):
        faults.append(f"{IMAGE} outside a question")
    placed = [turn.text for turn in turns]
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if not places and first is not None:
        placed[first] = images_first(placed[first], images)
    if images == 1:
        placed = [_in_front(text) if IMAGE in text else text for text in placed]
    return [Turn(turn.role, text) for turn, text in zip(turns, placed)]


def _in_front(text: str) -> str:
    return images_first(text.replace(IMAGE, "").strip(), 1).strip()
