"""The curve of compressed encoders: the same bytes for the same figures, and each form in its series."""

import pytest
from plot_points import CROWDED

from benchmarks.suites import compression_plot

ENCODERS = {name: {"bytes": mb * 1e6, "snr": snr, "agreement": snr / 60} for name, (mb, snr) in CROWDED.items()}


def test_the_same_bytes_every_time_and_others_for_another_curve(tmp_path):
    other = ENCODERS | {"int8": ENCODERS["int8"] | {"snr": 20}}
    written = []
    for name, encoders in (("one.png", ENCODERS), ("again.png", ENCODERS), ("other.png", other)):
        compression_plot.write_plot(encoders, tmp_path / name, "a title")
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1] != written[2] and len(list(tmp_path.iterdir())) == 3


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
