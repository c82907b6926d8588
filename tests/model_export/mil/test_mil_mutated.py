"""Programs with blocks, lists, states and pictures with one thing changed, and packages with bytes changed: they run or
are one line, within little memory and time."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mil_mutations as mutations
import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb
from PIL import Image
from test_mil_programs import collatz, doubling, nested

from model_export import mil
from model_export.mil.executor import MILExecutor
from model_export.mil.program import Block, NamedType, Operation, Program

import coremltools as ct  # isort: skip

X, N = np.array([1, -2, 3], np.float32), np.array([5], np.int32)
PICTURE = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
MOST_BYTES, MOST_ITERATIONS, ROUNDS = 64 << 20, 200, 120


def lists(x: Any, n: Any) -> Any:
    ls = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(3,), dtype="fp32"), index=mb.squeeze(x=n), value=x)
    ls = mb.list_scatter(ls=ls, indices=np.array([0, 1], np.int32), value=np.ones((2, 3), np.float32))
    return mb.list_gather(ls=ls, indices=n), mb.list_read(ls=ls, index=1), mb.identity(x=mb.list_length(ls=ls))


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def _state(path: Path) -> None:
    total = ct.StateType(wrapped_type=ct.TensorType(shape=(3,), dtype=np.float16), name="total")
    traced = torch.jit.trace(packages.Sum().eval(), torch.zeros(3), check_trace=False)
    x = ct.TensorType("x", (3,), dtype=np.float16)
    ct.convert(
        traced, inputs=[x], states=[total], minimum_deployment_target=ct.target.iOS18, skip_model_load=True
    ).save(str(path))  # fmt: skip


def _picture(path: Path) -> None:
    image = ct.ImageType("image", ct.Shape((1, 3, ct.RangeDim(4, 9), 8)), scale=0.5)
    labels = ct.ClassifierConfig(["a", "b", "c"])
    traced = torch.jit.trace(Mean(), torch.zeros(1, 3, 8, 8))
    ct.convert(traced, inputs=[image], classifier_config=labels, skip_model_load=True).save(str(path))


Made = dict[str, tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Packages, each with inputs."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    both = {"x": X, "n": N}
    for build, inputs in ((collatz, {"n": N}), (nested, both), (doubling, both), (lists, both)):
        found[build.__name__] = folder / f"{build.__name__}.mlpackage", inputs
        packages.save_program(found[build.__name__][0], build, inputs, "iOS18")
    for save, inputs in ((_state, {"x": X}), (_picture, {"image": PICTURE})):
        found[save.__name__] = folder / f"{save.__name__}.mlpackage", inputs
        save(found[save.__name__][0])
    return found


def run(program: Program, inputs: dict[str, Any]) -> None:
    executor = MILExecutor(program, most_bytes=MOST_BYTES, most_iterations=MOST_ITERATIONS)
    executor.predict(inputs, executor.make_state() if executor.interface.states else None)


def places(block: Block, path: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[tuple[tuple[int, int], ...], int]]:
    """Where operations are: the (operation, block) on the way, and the place in the block."""
    for index, operation in enumerate(block.operations):
        yield path, index
        for number, inner in enumerate(operation.blocks):
            yield from places(inner, (*path, (index, number)))


def changed(block: Block, path: tuple[tuple[int, int], ...], change: Callable[[Block], Block]) -> Block:
    """The block with one in it changed."""
    if not path:
        return change(block)
    (index, number), *rest = path
    operations = list(block.operations)
    blocks = list(operations[index].blocks)
    blocks[number] = changed(blocks[number], tuple(rest), change)
    operations[index] = replace(operations[index], blocks=tuple(blocks))
    return replace(block, operations=tuple(operations))


def mutated(program: Program, rng: random.Random) -> Program:
    function = program.functions["main"]
    path, index = rng.choice(list(places(function.block)))

    def change(block: Block) -> Block:
        operations, kind = list(block.operations), rng.randrange(6)
        if kind == 0:
            del operations[index]
        elif kind == 1:
            rng.shuffle(operations)
        elif kind == 2 and path:
            return replace(block, outputs=(*block.outputs[1:], rng.choice(_names(function.block))))
        elif kind == 3:
            operations[index] = _rewired(operations[index], rng.choice(_names(function.block)), rng)
        elif kind == 4 and operations[index].blocks:
            blocks = operations[index].blocks
            operations[index] = replace(
                operations[index], blocks=rng.choice((blocks[::-1], blocks[:1], blocks * 2, ()))
            )
        else:
            operations[index] = mutations._changed(_static(operations[index]), rng)
        return replace(block, operations=tuple(operations))

    function = replace(function, block=changed(function.block, path, change))
    return replace(program, functions={"main": function})


def _static(operation: Operation) -> Operation:
    """As `mutations` takes it: with a tensor as its first result."""
    if operation.outputs and operation.outputs[0].type is None:
        return replace(operation, outputs=())
    return operation


def _rewired(operation: Operation, name: str, rng: random.Random) -> Operation:
    if not operation.inputs:
        return operation
    return replace(operation, inputs={**operation.inputs, rng.choice(sorted(operation.inputs)): (name,)})


def _names(block: Block) -> list[str]:
    def items(block: Block) -> Iterator[NamedType]:
        yield from block.inputs
        for operation in block.operations:
            yield from operation.outputs
            for inner in operation.blocks:
                yield from items(inner)

    return [item.name for item in items(block)]


def test_a_changed_program_runs_or_is_one_line(made: Made) -> None:
    rng, refused, ran = random.Random(0), 0, 0
    for path, inputs in made.values():
        program = mil.read_package(path)
        run(program, inputs)  # the control
        for _ in range(ROUNDS):
            other = mutated(program, rng)
            try:
                run(other, inputs)
                ran += 1
            except mil.MILError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(made) * ROUNDS / 2 and ran > len(made)


def test_a_package_with_changed_bytes_runs_or_is_one_line(made: Made, tmp_path: Path) -> None:
    rng, refused, ran = random.Random(1), 0, 0
    for name, (path, inputs) in made.items():
        copy = Path(shutil.copytree(path, tmp_path / path.name))
        file = copy / "Data/com.apple.CoreML/model.mlmodel"
        whole = file.read_bytes()
        for _ in range(ROUNDS):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3, 20))):
                place = rng.randrange(len(data))
                data[place] = rng.choice((0, 1, 0x7F, 0xFF, data[place] ^ (1 << rng.randrange(8))))
            if rng.random() < 0.2:
                place = rng.randrange(len(data))
                data[place : place + rng.randrange(200)] = rng.choice((b"", b"\xff" * 9, data[:50]))
            file.write_bytes(data)
            try:
                run(mil.read_package(copy), inputs)
                ran += 1
            except mil.MILError as error:
                refused += 1
                assert "\n" not in str(error), name
    assert refused > ROUNDS and ran > ROUNDS / 4
