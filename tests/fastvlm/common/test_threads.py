"""How many threads a command has: bound cores, a container's share of time, what the user says."""

import os
from pathlib import Path

import pytest
import torch

from fastvlm.common import threads


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Bound to four, and the file that says what share of their time a container has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7}, raising=False)
    monkeypatch.setattr(threads, "_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (None, 4),
        ("max 100000", 4),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("400000 100000", 4),
        ("900000 100000", 4),
        ("", 4),
    ],
)
def test_no_more_cores_than_the_share_of_time(four_cores: Path, share: str | None, expected: int) -> None:
    if share is not None:
        four_cores.write_text(f"{share}\n")
    assert threads.cores() == threads.count() == expected
    said = threads.defaults({})
    assert said.get("OMP_NUM_THREADS") == (None if expected == 4 else str(expected))
    assert threads.defaults({"OMP_NUM_THREADS": "3"}) == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(("stated", "expected"), [("3", 3), ("9", 9), ("0", 4), ("many", 4), ("", 4)])
def test_a_stated_number_is_the_number(
    four_cores: Path, stated: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    assert threads.count() == expected and threads.cores() == 4


def test_alone_is_one_thread_and_the_number_before_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(ZeroDivisionError), threads.alone() as count:
            assert torch.get_num_threads() == 1 and count == before + 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
