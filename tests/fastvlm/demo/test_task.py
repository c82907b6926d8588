"""The task that the demo checkpoint doesn't know: its answers are true of the pixels, its files are a seed's."""

from pathlib import Path

import numpy as np

from fastvlm.data import charts
from fastvlm.data.records import read_records
from fastvlm.data.scenes import COLOURS
from tests.helpers import contents


def _bars(image) -> dict[str, int]:
    """The bars' colours and heights in pixels, from the picture alone: every pixel is of the nearest colour."""
    table = {**COLOURS, "line": (120, 120, 120), "paper": (236, 236, 236)}
    near = ((np.asarray(image, float)[:, :, None] - np.array([*table.values()])) ** 2).sum(-1).argmin(-1)
    areas = {colour: near == index for index, colour in enumerate(table) if colour in COLOURS}
    return {colour: int(area.sum(0).max()) for colour, area in areas.items() if area.sum() > 400}


def test_the_answers_are_true_of_the_picture():
    told = set()
    for entry in charts.questions(120, seed=3):
        bars = _bars(entry.image)
        colours = {"tallest": max(bars, key=bars.__getitem__), "shortest": min(bars, key=bars.__getitem__)}
        true = {"number": f"There are {len(bars)}."} | {kind: f"It is {name}." for kind, name in colours.items()}
        assert entry.answer == true[entry.kind] and entry.kind in entry.question.replace("How many", "number")
        told.add((entry.kind, entry.answer))
    assert len(told) > 12  # no kind has one answer


def test_a_task_is_a_function_of_the_seed_and_nothing_is_held_out_twice(cli, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        done = cli("demo", "--task", "charts", "--count", 12, "--seed", seed, "--output-dir", tmp_path / name, "--json")
        assert done.code == 0 and done.document["training"] == 12 and done.document["replayed"] == 2
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again and one.keys() == other.keys() and one["train.json"] != other["train.json"]
    records = {name: read_records(tmp_path / "one" / f"{name}.json") for name in ("train", "held_out")}
    seen, held = ({path.read_bytes() for r in rows for path in r.images} for rows in records.values())
    assert len(seen) == 4 + 2 and len(held) == 1 and not seen & held
    refused = cli("demo", "--task", "charts", "--output-dir", tmp_path / "one")
    assert refused.code == 2 and "exists already" in refused.err
    Path(tmp_path / "mine").mkdir()
    assert cli("demo", "--task", "charts", "--output-dir", tmp_path / "mine", "--overwrite").code == 2
