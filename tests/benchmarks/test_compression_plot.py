"""The curve of compressed encoders: every point named, no name over a point, another name or the frame."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from benchmarks.suites import compression_plot

CROWDED = {
    "fp16": (9.5, 55, 1.0), "palette4": (2.5, 15, 0.55), "palette6": (3.7, 28, 0.95), "palette8": (4.9, 40, 0.995),
    "palette4-g16": (2.7, 19, 0.8), "palette6-g16": (4.5, 32, 0.985), "palette8-g16": (7.9, 46, 1.0),
    "palette4-g16-scaled": (2.75, 20, 0.82), "int8": (4.85, 41, 1.0), "int4-b32": (2.8, 17, 0.75),
    "min-snr-20": (2.76, 20.1, 0.83), "min-snr-30": (4, 30.1, 0.97), "min-snr-40": (5, 40.1, 1.0),
}  # fmt: skip
ENCODERS = {name: {"bytes": mb * 1e6, "snr": snr, "agreement": same} for name, (mb, snr, same) in CROWDED.items()}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The file, and the boxes of all names and of all points, by the axes."""
    seen = []
    label = compression_plot._label

    def spy(axes, encoders, key, factor):
        label(axes, encoders, key, factor)
        renderer = axes.figure.canvas.get_renderer()
        names = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
        points = [axes.transData.transform((one["bytes"] / 1e6, factor * one[key])) for one in encoders.values()]
        seen.append((axes.get_window_extent(renderer), names, points))

    monkeypatch.setattr(compression_plot, "_label", spy)
    compression_plot.write_plot(ENCODERS, tmp_path / "curve.png", "a title")
    return tmp_path / "curve.png", seen


def test_every_point_has_a_name_of_its_own_place(drawn):
    path, seen = drawn
    assert len(seen) == 2
    for frame, names, points in seen:
        assert len(names) == len(ENCODERS)
        assert {"≥ 20 dB", "palette4-g16-scaled"} <= names.keys()
        for a, b in combinations(names.values(), 2):
            assert not a.overlaps(b)
        for box in names.values():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1
            assert not any(box.contains(x, y) for x, y in points)
    assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_the_same_bytes_every_time_and_nothing_left_over(drawn, tmp_path):
    path, _ = drawn
    compression_plot.write_plot(ENCODERS, tmp_path / "again.png", "a title")
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()
    other = {name: one | {"snr": one["snr"] - 5} for name, one in ENCODERS.items()}  # the control: another curve
    compression_plot.write_plot(other | {"fp16": ENCODERS["fp16"]}, tmp_path / "other.png", "a title")
    assert (tmp_path / "other.png").read_bytes() != path.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.png", "curve.png", "other.png"]


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("palette4", "palette of the tensor"),
        ("palette4-g16-scaled", "palettes of 16 channels"),
        ("int4-b32", "integers"),
        ("min-snr-30", "chosen for each layer by --min-snr"),
        ("fp16", "fp16"),
    ],
)
def test_families(name, series):
    assert compression_plot.family(name) == series
    assert series in compression_plot._FAMILIES
