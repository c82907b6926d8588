"""Records for tiny fine-tunes, and the fine-tune that test_finetune_stops kills: imports are done before it starts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastvlm.finetune import run as running
from fastvlm.finetune.plan import plan
from fastvlm.finetune.settings import Settings

COLOURS = ("red", "lime", "blue", "gray")


def write_records(folder: Path) -> tuple[Path, Path]:
    """Twelve training records, some without picture, with two, or of several turns, and four for evaluation."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (96, 64 + 32 * number), colour)
        image.putpixel((0, 0), tuple(int(value) for value in rng.integers(0, 256, 3)))
        image.save(folder / f"{number}.png")
    rows: list[dict] = []
    for number, colour in enumerate(COLOURS):
        asked = ("<image>\nWhich colour?", colour, "Sure?", f"Yes, {colour} it is.")
        rows.append({"image": f"{number}.png", "conversations": _turns(*asked)})
        rows.append({"image": f"{number}.png", "conversations": _turns("<image>\nName it.", f"It is {colour}.")})
    two = ["0.png", "1.png"]
    rows.append({"image": two, "conversations": _turns("<image> and <image>?", "Red and lime.")})
    rows += [{"conversations": _turns(f"Say {word}.", word)} for word in ("one", "two words", "three")]
    held = [{"image": f"{n}.png", "conversations": _turns("Which one?", c)} for n, c in enumerate(COLOURS)]
    for name, records in (("train.json", rows), ("held.json", held)):
        (folder / name).write_text(json.dumps(records))
    return folder / "train.json", folder / "held.json"


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def settings(checkpoint: str, folder: str, output: str, **others: object) -> Settings:
    """A few steps on these records."""
    small = {"epochs": 4, "batch_size": 3, "max_new_tokens": 4, "device": "cpu", "learning_rate": 0.01}
    return Settings(Path(checkpoint), Path(folder, "train.json"), Path(output), **(small | others))  # type: ignore[arg-type]


def finetune(checkpoint: str, folder: str, output: str) -> None:
    """A fine-tune with a state after every second step."""
    held = Path(folder, "held.json")
    running.run(plan(settings(checkpoint, folder, output, evaluation_data=held, save_steps=2, epochs=2)))
