"""Programs that were made to break the executor: MILError in one line, within little memory and time."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import mil_mutations as mutations
import numpy as np
import pytest
import torch

from model_export import mil
from model_export.mil.dtypes import STORAGE
from model_export.mil.executor import MILExecutor
from model_export.mil.program import Block, Constant, Function, NamedType, Operation, Program, TensorType

ROUNDS = 3


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Program]:
    return list(mutations.programs(tmp_path_factory.mktemp("programs")))


@pytest.mark.slow
def test_a_changed_program_runs_or_is_one_line(programs: list[Program]) -> None:
    """Each operation with each parameter changed, in turn: what torch raises isn't let through."""
    rng, refused = random.Random(0), 0
    for program in programs:
        MILExecutor(program).predict(mutations.arrays(program))  # the control: as it was, it runs
    for _ in range(ROUNDS):
        for program in programs:
            changed = mutations.mutated(program, rng)
            try:
                MILExecutor(changed, rng.choice(("as-typed", "strict-fp16", "int8"))).predict(mutations.arrays(changed))
            except mil.MILError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > ROUNDS * len(programs) / 2


SIDE = 40_000
Sizes = tuple[int, ...]


def chain(*operations: tuple[str, dict[str, Any], Sizes]) -> Program:
    """A program over x, fp32[1, 4]: operations (type, parameters, declared sizes) whose results are v0, v1, ...; the
    last one's is returned."""
    block = tuple(
        Operation(type, f"v{place}", {key: bindings(value) for key, value in parameters.items()},
                  (NamedType(f"v{place}", TensorType("fp32", sizes)),), {})
        for place, (type, parameters, sizes) in enumerate(operations)
    )  # fmt: skip
    last = block[-1].outputs[0]
    x = TensorType("fp32", (1, 4))
    function = Function("main", "CoreML7", (NamedType("x", x),), Block((), (last.name,), block), {"x": x},
                        {last.name: last.type})  # fmt: skip
    return Program(Path("made.mlpackage"), 8, {"main": function}, "main")


def bindings(value: Any) -> tuple[Any, ...]:
    """A name, several names, or a constant."""
    if isinstance(value, (str, tuple)):
        return (value,) if isinstance(value, str) else value
    tensor = torch.tensor(value)
    dtype = "fp32" if tensor.is_floating_point() else "int32"
    return (Constant(TensorType(dtype, tuple(tensor.shape)), tensor.to(STORAGE[dtype])),)


def fill(*sizes: int) -> tuple[str, dict[str, Any], Sizes]:
    return "fill", {"shape": list(sizes), "value": 1.0}, sizes


# The last operation's result is too large, by its own parameters or operands.
TOO_LARGE = {
    "fill": [fill(SIDE, SIDE)],
    "tile": [("tile", {"x": "x", "reps": [SIDE, SIDE // 4]}, (SIDE, SIDE))],
    "pad": [("pad", {"x": "x", "pad": [0, SIDE, 0, SIDE]}, (SIDE + 1, SIDE + 4))],
    "broadcast": [fill(SIDE, 1), fill(1, SIDE), ("add", {"x": "v0", "y": "v1"}, (SIDE, SIDE))],
    "matmul": [fill(SIDE, 1), fill(1, SIDE), ("matmul", {"x": "v0", "y": "v1"}, (SIDE, SIDE))],
    "concat": [fill(SIDE, 8000), ("concat", {"values": ("v0",) * 5, "axis": 1}, (SIDE, SIDE))],
}


@pytest.mark.parametrize("lies", [False, True], ids=["as declared", "declared small"])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_memory_is_bounded_before_anything_runs(name: str, lies: bool) -> None:
    *before, (type, parameters, sizes) = TOO_LARGE[name]
    program = chain(*before, (type, parameters, (2, 2) if lies else sizes))
    with pytest.raises(mil.MILError, match=r"gives \[" if lies else r"gives \[|expected at most"):
        MILExecutor(program)


def test_values_that_live_at_once_are_added_up() -> None:
    small = [fill(1, 10**8) for _ in range(12)]
    whole = ("concat", {"values": tuple(f"v{n}" for n in range(12)), "axis": 0}, (12, 10**8))
    with pytest.raises(mil.MILError, match=r"v10.* take 4400000016 bytes, expected at most 4294967296"):
        MILExecutor(chain(*small, whole))


def test_the_bound_is_the_callers() -> None:
    program, needed = chain(fill(10, 100)), 4 * (4 + 1000)
    assert MILExecutor(program, most_bytes=needed).predict({"x": np.ones((1, 4), np.float32)})["v0"].sum() == 1000
    with pytest.raises(mil.MILError, match=f"take {needed} bytes, expected at most {needed - 1}"):
        MILExecutor(program, most_bytes=needed - 1)


@pytest.mark.parametrize("name", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"])
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_only_plain_files_of_bounded_size_are_read(name: str, kind: str, tiny_artefact: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_artefact / "fastvithd.mlpackage", tmp_path / "x.mlpackage")
    mil.load(path)  # the control
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        with (path / name).open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(mil.MILError, match=r"plain file|outside the package"):
        mil.load(path)
