"""Programs that were made to break the executor: every case of mil_cases alone, with one thing in it changed."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import torch
from mil_cases import CASES, apply, named

from model_export.mil.blob import immediate
from model_export.mil.dtypes import STORAGE
from model_export.mil.program import BlobRef, Block, Constant, Function, Operation, Program, TensorType
from model_export.mil.reader import read_package
from model_export.mil.types import NUMPY

EXTREMES = (0, -1, 1, 2, 7, 255, 65536, 2**31 - 1, -(2**31))
TEXTS = ("", "same", "custom", "no such mode", "\x1b[2J", "é" * 1000)


def programs(folder: Path) -> Iterator[Program]:
    """One for each case, of one operation and what it needs."""
    for target in sorted({case.target for case in CASES}):
        cases = {i: case for i, case in enumerate(CASES) if case.target == target}

        def build(cases: Any = cases, **variables: Any) -> Any:
            outputs = (apply(c, {name: variables[f"i{i}_{name}"] for name in c.inputs}) for i, c in cases.items())
            return tuple(output for case in outputs for output in case)

        path = folder / f"{target}.mlpackage"
        packages.save_program(path, build, named(cases), target)
        whole = read_package(path)
        function = whole.functions["main"]
        makers = {output.name: operation for operation in function.block.operations for output in operation.outputs}
        for operation in function.block.operations:
            if operation.type not in ("const", "cast", "identity") or operation.type in {case.op for case in CASES}:
                yield _alone(whole, function, operation, makers)


def _alone(whole: Program, function: Function, last: Operation, makers: dict[str, Operation]) -> Program:
    needed, names = [last], set()
    for operation in needed:  # grows
        for name in (item for items in operation.inputs.values() for item in items if isinstance(item, str)):
            if name not in makers:
                names.add(name)
            elif makers[name] not in needed:
                needed.append(makers[name])
    ordered = tuple(operation for operation in function.block.operations if operation in needed)
    outputs = {item.name: item.type for item in last.outputs if item.type is not None and item.type.dtype in NUMPY}
    return _program(whole, replace(
        function,
        inputs=tuple(item for item in function.inputs if item.name in names),
        block=Block((), tuple(outputs), ordered),
        described_inputs={name: type for name, type in function.described_inputs.items() if name in names},
        described_outputs=outputs,
    ))  # fmt: skip


def _program(whole: Program, function: Function) -> Program:
    return replace(whole, functions={"main": function}, default_function="main")


def mutated(program: Program, rng: random.Random) -> Program:
    """The program with one constant, operand or declared type changed."""
    function = program.functions["main"]
    operations = list(function.block.operations)
    place = rng.randrange(len(operations))
    operations[place] = changed = _changed(operations[place], rng)
    described = dict(function.described_outputs)
    if place == len(operations) - 1:  # or else only the two declarations would be compared
        described |= {item.name: item.type for item in changed.outputs if item.name in described and item.type}
    block = replace(function.block, operations=tuple(operations))
    return _program(program, replace(function, block=block, described_outputs=described))


def _changed(operation: Operation, rng: random.Random) -> Operation:
    attributes = {key: value for key, value in operation.attributes.items() if key != "name"}
    kind = rng.choice(["constant"] * 3 + ["output", "operand"])
    if kind == "constant" and attributes:
        key = rng.choice(sorted(attributes))
        constant = _other(attributes[key], rng)
        outputs = operation.outputs
        if operation.type == "const" and rng.random() < 0.9:
            outputs = tuple(replace(item, type=constant.type) for item in outputs)
        return replace(operation, attributes=operation.attributes | {key: constant}, outputs=outputs)
    if kind == "operand" and operation.inputs:
        key = rng.choice(sorted(operation.inputs))
        few = (
            (),
            operation.inputs[key] * 2,
            operation.inputs[key][:1],
            (Constant(TensorType("fp32", ()), torch.ones(())),),
        )
        return replace(operation, inputs={**operation.inputs, key: rng.choice(few)})
    if not operation.outputs or rng.random() < 0.1:
        return replace(operation, outputs=())
    first, *rest = operation.outputs
    assert first.type is not None
    shape: list[Any] = list(first.type.shape)
    if shape and rng.random() < 0.8:
        shape[rng.randrange(len(shape))] = rng.choice([*map(abs, EXTREMES), None, 2**63])
    else:
        shape.append(rng.choice((1, 40000)))
    dtype = first.type.dtype if rng.random() < 0.8 else rng.choice(sorted(STORAGE))
    return replace(operation, outputs=(replace(first, type=TensorType(dtype, tuple(shape))), *rest))


def _other(constant: Constant, rng: random.Random) -> Constant:
    data, type = constant.data, constant.type
    if isinstance(data, BlobRef):
        return replace(constant, data=replace(data, offset=rng.choice((0, 1, 64, 2**62))))
    if isinstance(data, np.ndarray) and rng.random() < 0.9:
        data = immediate(constant)
    if not isinstance(data, torch.Tensor):
        return replace(constant, data=rng.choice(TEXTS))
    if rng.random() < 0.3:  # more or fewer of them
        flat = data.reshape(-1).repeat(rng.choice((2, 3)))[: rng.choice((0, 1, 5))]
        return Constant(TensorType(type.dtype, tuple(flat.shape)), flat)
    if data.dtype == torch.bool:
        return replace(constant, data=~data)
    values = data.clone().reshape(-1)
    if not values.numel():
        return constant
    extremes = (*EXTREMES, float("nan"), float("inf")) if data.is_floating_point() else EXTREMES
    where = slice(None) if rng.random() < 0.3 else rng.randrange(values.numel())
    values[where] = torch.tensor(rng.choice(extremes)).to(data.dtype)
    return replace(constant, data=values.reshape(data.shape))


def arrays(program: Program) -> dict[str, np.ndarray]:
    """Inputs of the declared types."""
    inputs = program.functions["main"].inputs
    return {
        item.name: np.ones([size or 1 for size in item.type.shape], NUMPY[item.type.dtype])
        for item in inputs if item.type is not None
    }  # fmt: skip
