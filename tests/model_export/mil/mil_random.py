"""Random ML programs: what hypothesis draws, how coremltools' builder writes it down, and what it must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
from mil_packages import mb
from mil_random_oracles import BOOLEAN, COUNTS, formula

from model_export import mil

MOST = 1024  # elements of a value
DTYPES = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}


@dataclass(frozen=True)
class Line:
    """One operation: its results' names, the earlier values that are its operands (several in a tuple), its constant
    parameters, and the lines of its blocks (a branch's two; a loop's one, which starts from its `x`)."""

    op: str
    results: tuple[str, ...]
    operands: Mapping[str, str | tuple[str, ...]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[tuple[Line, ...], ...] = ()

    def __str__(self) -> str:
        given = {**self.operands, **self.parameters}
        inner = "".join(f" {{{'; '.join(map(str, block))}}}" for block in self.blocks)
        return f"{', '.join(self.results)} = {self.op}({', '.join(f'{k}={v!r}' for k, v in given.items())}){inner}"

    @property
    def read(self) -> Iterator[str]:
        """The names of its operands."""
        for item in self.operands.values():
            yield from item if isinstance(item, tuple) else (item,)
        for block in self.blocks:
            for line in block:
                yield from line.read


@dataclass(frozen=True)
class Drawn:
    """A program: its inputs' values, and its lines. What no line reads is returned."""

    target: str
    inputs: dict[str, np.ndarray]
    lines: tuple[Line, ...]

    def __repr__(self) -> str:
        given = [f"{name}: {value.dtype}{list(value.shape)} {value.tolist()}" for name, value in self.inputs.items()]
        return "\n".join([self.target, *given, *map(str, self.lines)])

    @property
    def outputs(self) -> list[str]:
        """What it returns."""
        read = {name for line in self.lines for name in line.read}
        return [name for line in self.lines for name in line.results if name not in read]

    def save(self, path: Path) -> None:
        """Write it as a package."""

        def build(**values: Any) -> Any:
            env = dict(values)
            _emit(self.lines, env)
            return tuple(env[name] for name in self.outputs)

        packages.save_program(path, build, self.inputs, self.target)


def _emit(lines: Sequence[Line], env: dict[str, Any]) -> None:
    for line in lines:
        given = {
            key: tuple(env[item] for item in name) if isinstance(name, tuple) else env[name]
            for key, name in line.operands.items()
        }
        first = line.results[0]
        if line.op == "cond":
            branches = [_block(block, env) for block in line.blocks]
            made = mb.cond(pred=given["pred"], _true_fn=branches[0], _false_fn=branches[1], name=first)
        elif line.op == "while_loop":
            count, (body,) = line.parameters["count"], line.blocks
            made = mb.while_loop(
                _cond=lambda i, x, count=count: mb.less(x=i, y=np.int32(count)),
                _body=lambda i, x, body=body: (mb.add(x=i, y=np.int32(1)), _block(body, env | {"x": x})()),
                loop_vars=(np.int32(0), given["x"]), name=first,
            )[1:]  # fmt: skip
        else:
            made = getattr(mb, line.op)(**given, **line.parameters, name=first)
        env.update(zip(line.results, made if isinstance(made, (tuple, list)) else (made,), strict=True))


def _block(lines: Sequence[Line], env: dict[str, Any]) -> Callable[[], Any]:
    def run() -> Any:
        inner = dict(env)
        _emit(lines, inner)
        return inner[lines[-1].results[0]]

    return run


# -- what it gives -----------------------------------------------------------------------------------------------------


def evaluate(line: Line, values: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The line's results, in float64 or as integers, each with the bound of its error."""
    given = {
        key: tuple(values[item] for item in name) if isinstance(name, tuple) else values[name]
        for key, name in line.operands.items()
    }
    if line.op == "cond":
        return [(_run(line.blocks[0 if given["pred"] else 1], values), np.zeros(()))]
    if line.op == "while_loop":
        x = given["x"]
        for _ in range(line.parameters["count"]):
            x = _run(line.blocks[0], {**values, "x": x})
        return [(x, np.zeros(()))]
    return formula(line.op, {**given, **line.parameters})


def _run(lines: Sequence[Line], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A block, whose operations are single roundings."""
    inner = dict(values)
    for line in lines:
        ((value, _),) = evaluate(line, inner)
        inner[line.results[0]] = value.astype(inner[line.operands["x"]].dtype)
    return inner[lines[-1].results[0]]


def dtype_of(line: Line, place: int, values: Mapping[str, np.ndarray]) -> np.dtype:
    """The element type of a result."""
    if line.op in BOOLEAN:
        return np.dtype(bool)
    if line.op in COUNTS or (line.op == "topk" and place == 1):
        return np.dtype(np.int32)
    if line.op == "cast":
        return np.dtype(DTYPES[line.parameters["dtype"]])
    key = next(k for k in ("a", "data", "ref_tensor", "values", "x", "indices") if k in line.operands)
    name = line.operands[key]
    return values[name[0] if isinstance(name, tuple) else name].dtype


def check(drawn: Drawn, package: Path, compute: str = "as-typed") -> int:
    """Each operation of the saved program gives what its line says, for the operands that the executor itself had;
    unwatched, the outputs are the same. Returns how many were compared."""
    model = mil.load(package, compute=compute)
    seen: dict[str, np.ndarray] = {}

    def watch(operation: Any, outputs: Mapping[str, Any]) -> None:
        seen.update({name: value.numpy().copy() for name, value in outputs.items() if hasattr(value, "numpy")})

    given = {name: value.copy() for name, value in drawn.inputs.items()}
    watched = model.run(given, watch)
    seen = {**watched, **seen}
    wide = {np.dtype(np.float16): np.float32} if compute == "float32" else {}
    values = {name: value.astype(wide.get(value.dtype, value.dtype)) for name, value in drawn.inputs.items()}
    compared = 0
    for line in drawn.lines:
        for place, (name, (wanted, error)) in enumerate(zip(line.results, evaluate(line, values), strict=True)):
            dtype = dtype_of(line, place, values)
            holds = np.dtype(np.float32) if dtype == np.float16 and compute == "float32" else dtype
            # What coremltools made of it when it saved the program (constants, casts of casts) isn't there.
            saved = name if len(line.results) == 1 or name in seen else f"{line.results[0]}_{place}"
            if saved in seen:
                got = seen[saved]
                assert got.shape == wanted.shape, f"{line}: {got.shape}, expected {wanted.shape}"
                low, high = (_rounded(wanted + sign * error if dtype.kind == "f" else wanted, holds)
                             for sign in (-1, 1))  # fmt: skip
                good = ((low <= got) & (got <= high)) | ((got != got) & (low != low))
                assert good.all(), f"{line}:\ngot      {got[~good]}\nexpected {wanted[~good]}"
                compared += 1
            values[name] = _rounded(seen.get(saved, wanted), dtype if compute == "as-typed" else holds)
    for repeat in range(2):
        again = model.predict(given)
        for name in watched:
            np.testing.assert_array_equal(again[name], watched[name], err_msg=f"{name}, prediction {repeat}")
    for name, value in drawn.inputs.items():
        np.testing.assert_array_equal(given[name], value, err_msg=f"input {name} was written over")
    return compared


def _rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(dtype)
