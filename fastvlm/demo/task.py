"""`fastvlm demo --task`: pictures and records of a task that the demo checkpoint doesn't know, to fine-tune it with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.staging import staged
from fastvlm.data import charts, scenes
from fastvlm.data.prompt import IMAGE

TASKS = {"charts": charts.questions}
TRAINING, HELD_OUT = "train.json", "held_out.json"
RECORDS = 4500  # for training
_HELD_OUT = 15  # for every so many training records, one that is held out
_REPLAY = 4  # for every so many of the new task, one record of those that the checkpoint knows: it forgets less


def write_task(name: str, folder: Path, count: int, seed: int, overwrite: bool) -> dict[str, Any]:
    """Write `count` training records and a fifteenth as many held-out ones, with their pictures, into a new folder.

    Every fifth training record is of the demo's own kinds, so that they aren't forgotten; held-out ones are all new.
    UserError for a folder that exists, unless `overwrite` and one of these files are given.
    """
    if folder.exists() and not (overwrite and (folder / HELD_OUT).is_file()):
        raise UserError(f"{folder}: exists already: give another --output-dir, or --overwrite for a task's folder")
    replayed, kept = count // (_REPLAY + 1), max(len(charts.KINDS), count // _HELD_OUT)
    with staged(folder, replace=overwrite) as staging, progress("draw (records)", count + kept) as advance:
        (staging / "pictures").mkdir()
        questions = TASKS[name]
        training = [
            *_rows(staging, "new", questions(count - replayed, seed, "train"), advance),
            *_rows(staging, "known", scenes.questions(replayed, seed + 1, "train"), advance),
        ]
        held_out = _rows(staging, "held-out", questions(kept, seed), advance)
        for file, rows in ((TRAINING, training), (HELD_OUT, held_out)):
            (staging / file).write_text(json.dumps(rows, indent=1) + "\n")
    return {
        "task": name, "seed": seed, "training": len(training), "replayed": replayed, "held_out": len(held_out),
        "files": [str(folder / TRAINING), str(folder / HELD_OUT)],
    }  # fmt: skip


def _rows(folder: Path, split: str, questions: Iterable[scenes.Question], advance: Any) -> list[dict[str, Any]]:
    """The questions in LLaVA's format, their pictures written."""
    rows, image = [], None
    for number, entry in enumerate(questions):
        if entry.image is not image:  # several questions may be about one
            image, picture = entry.image, f"pictures/{split}-{number:04}.jpg"
            image.save(folder / picture, quality=92)
        turns = [("human", f"{IMAGE}\n{entry.question}"), ("gpt", entry.answer)]
        rows.append(
            {
                "id": f"{split} {number}: {entry.kind}",
                "image": picture,
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
        advance()
    return rows
