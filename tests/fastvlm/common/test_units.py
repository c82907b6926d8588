"""Bytes and seconds as text."""

import pytest

from fastvlm.common.units import counted, format_bytes, format_duration, format_seconds


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (62_400, "62.4 kB"), (999_400, "999 kB"), (999_500, "1 MB"),
     (16_640_000, "16.6 MB"), (999_499_999, "999 MB"), (999_500_000, "1.00 GB"), (15_231_000_000, "15.23 GB")],
)  # fmt: skip
def test_bytes_have_three_digits(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_counts_are_singular_or_plural() -> None:
    assert [counted(1, "core"), counted(2, "core"), counted(0, "process")] == ["1 core", "2 cores", "0 processes"]


def test_seconds_and_durations() -> None:
    assert [format_seconds(one) for one in (0.0012345, 0.9, 1.2345, 83.4)] == ["1.23 ms", "900 ms", "1.23 s", "83.4 s"]
    assert [format_duration(one) for one in (0.4, 119, 121, 3600)] == ["0 s", "119 s", "2 min", "60 min"]
