"""The checks behind the table `neural_engine_rules.json`: what each rule looks for in a graph.

The table has every threshold, reason, remedy and source; here is only how to find a violation. A check yields
(operation or name, what was found[, a remedy of its own, a source of its own]).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.common.units import format_bytes
from model_export.mil import Operation, Program, TensorType
from model_export.mil.costs import INPUT, OUTPUT, Graph, padded_size_of, size_of

TABLE = Path(__file__).with_name("neural_engine_rules.json")
_CONVOLUTIONS = ("conv", "conv_transpose")
_POOLS = ("avg_pool", "max_pool", "l2_pool")
_GLOBAL_POOL = {"avg_pool": "reduce_mean", "max_pool": "reduce_max", "l2_pool": "reduce_l2_norm"}
_PRODUCTS = ("matmul", "einsum")
_ATTENTION = (*_PRODUCTS, "softmax", "scaled_dot_product_attention")
_MOVES = frozenset({"cast", "transpose", "squeeze", "expand_dims"})
_CUTS = frozenset({"split", "slice_by_index", "slice_by_size", "concat"})
_ELEMENTWISE = frozenset({"mul", "real_div", "add", "sub", "layer_norm"})  # scales, masks and rotations of q and k


@dataclass(frozen=True)
class Rule:
    """One row of the table; `sources` are (title, URL)."""

    key: str
    title: str
    threshold: Mapping[str, Any]
    reason: str
    remedy: str
    sources: tuple[tuple[str, str], ...]


_Hit = tuple[Operation | str, str] | tuple[Operation | str, str, str, str]
_Check = Callable[[Graph, Mapping[str, Any]], Iterator[_Hit]]
CHECKS: dict[str, _Check] = {}


@cache
def _sources() -> dict[str, dict[str, str]]:
    return json.loads(TABLE.read_text())["sources"]


@cache
def rules() -> dict[str, Rule]:
    """The table, in its order."""
    named = _sources()
    table = {}
    for row in json.loads(TABLE.read_text())["rules"]:
        sources = tuple((named[name]["title"], named[name]["url"]) for name in row.pop("sources"))
        table[row["key"]] = Rule(**row, sources=sources)
    return table


def findings(program: Program, graph: Graph) -> list[dict[str, Any]]:
    """Every violation in one function of a program, rule by rule in the table's order: "rule", "operation" with its
    "type" and "shape", what was "found" there, the "remedy", and the URLs that are its "source"."""
    result: list[dict[str, Any]] = []
    for key, rule in rules().items():
        hits = _opset(program, graph, rule.threshold) if key == "weights-opset" else CHECKS[key](graph, rule.threshold)
        for where, problem, *own in hits:
            if isinstance(where, Operation):
                name, kind = where.name, where.type
                type = where.outputs[0].type if where.outputs else None
            else:
                name, kind, type = where, "input" if where in graph.inputs else "function", graph.types.get(where)
            remedy, source = own or (rule.remedy, None)
            result.append(
                {
                    "rule": key,
                    "operation": name,
                    "type": kind,
                    "shape": "" if type is None else str(type),
                    "found": problem,
                    "remedy": remedy,
                    "source": [_sources()[source]["url"]] if source else [url for _, url in rule.sources],
                }
            )
    return result


def _check(key: str) -> Callable[[_Check], _Check]:
    def register(function: _Check) -> _Check:
        CHECKS[key] = function
        return function

    return register


def _each_value(graph: Graph, fault: Callable[[TensorType], str | None]) -> Iterator[_Hit]:
    """The first fault among the results of each operation, and that of each of the function's inputs."""
    for item in graph.function.inputs:
        problem = fault(item.type) if item.type is not None else None
        if problem is not None:
            yield item.name, problem
    for operation in graph.operations:
        faults = (fault(item.type) for item in operation.outputs if item.type is not None)
        problem = next((problem for problem in faults if problem is not None), None)
        if problem is not None:
            yield operation, problem


@_check("rank")
def _rank(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    def fault(type: TensorType) -> str | None:
        return f"rank {len(type.shape)}" if len(type.shape) > threshold["rank"] else None

    return _each_value(graph, fault)


@_check("last-axis")
def _last_axis(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    def fault(type: TensorType) -> str | None:
        size, padded = size_of(type), padded_size_of(type, threshold["alignment_bytes"])
        if size and padded and padded > max(threshold["padded_bytes"], threshold["padding_factor"] * size):
            return f"{format_bytes(size)} take {format_bytes(padded)}, {padded / size:.0f} x"
        return None

    return _each_value(graph, fault)


def _leaves(graph: Graph, operation: Operation, threshold: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The table's group of operations that leave the engine which this one belongs to."""
    gathers = threshold["gathers"]
    if operation.type in gathers["operations"]:
        return None if graph.is_constant(operation, "indices") else gathers
    return next((group for group in threshold["groups"] if operation.type in group["operations"]), None)


@_check("unsupported-operation")
def _unsupported(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        group = _leaves(graph, operation, threshold)
        if group is not None:
            yield operation, group["why"], group["remedy"], group["source"]


@_check("dynamic-shape")
def _dynamic(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    described = graph.function.described_inputs
    for item in graph.function.inputs:
        types = [type for type in (item.type, described.get(item.name)) if type is not None]
        if any(None in type.shape for type in types):
            yield item.name, f"input {item.name} has no fixed shape"
    for operation in graph.operations:
        read = [type for name in graph.live(operation) if (type := graph.types.get(name)) is not None]
        made = [item.type for item in operation.outputs if item.type is not None]
        if not any(None in type.shape for type in read) and any(None in type.shape for type in made):
            yield operation, "its result's shape depends on values"


def _computes_in(graph: Graph, operation: Operation, dtypes: set[str]) -> list[str]:
    """The types among `dtypes` that it reads or makes."""
    types = [graph.types.get(name) for name in graph.live(operation)] + [item.type for item in operation.outputs]
    return sorted({type.dtype for type in types if type is not None and type.dtype in dtypes})


def _float32_program(graph: Graph) -> tuple[int, int]:
    """Operations on float32 or wider, and on any float; casts are conversions, not computations."""
    computed = [operation for operation in graph.operations if operation.type != "cast"]
    unwanted = sum(bool(_computes_in(graph, operation, {"fp32", "fp64"})) for operation in computed)
    return unwanted, sum(
        bool(_computes_in(graph, operation, {"fp16", "fp32", "fp64", "bf16"})) for operation in computed
    )


@_check("compute-precision")
def _precision(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    float32, floats = _float32_program(graph)
    if floats and float32 / floats > threshold["wide_share"]:
        yield graph.function.name, f"{float32} of {floats} operations on floats are float32 or wider"


@_check("float32-island")
def _islands(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    float32, floats = _float32_program(graph)
    types = set(threshold["wide"])
    if floats and float32 / floats > rules()["compute-precision"].threshold["wide_share"]:
        types -= {"fp32", "fp64"}  # not islands: reported once, for the whole function
    leaving = rules()["unsupported-operation"].threshold
    for operation in graph.operations:
        dtypes = _computes_in(graph, operation, types)
        if operation.type != "cast" and dtypes and _leaves(graph, operation, leaving) is None:
            yield operation, f"computes in {', '.join(dtypes)}"


def _norm_transposes(graph: Graph) -> dict[int, tuple[Operation, list[Operation]]]:
    """layer_norm operations between two transposes: id -> the operation and those transposes."""
    wrapped = {}
    for operation in graph.operations:
        if operation.type == "layer_norm":
            before = graph.reached(operation, frozenset({"cast"}), forward=False).get("transpose", [])
            after = graph.reached(operation, frozenset({"cast"}), forward=True).get("transpose", [])
            if before and after:
                wrapped[id(operation)] = operation, before + after
    return wrapped


@_check("transpose")
def _transposes(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    at_norms = {id(item) for _, transposes in _norm_transposes(graph).values() for item in transposes}
    interface = frozenset({"cast", "reshape"})
    for operation in graph.operations:
        if operation.type == "transpose" and id(operation) not in at_norms:
            behind, before = (graph.reached(operation, interface, forward=side) for side in (True, False))
            if OUTPUT not in behind and INPUT not in before:
                yield operation, f"permutes to {graph.value(operation, 'perm')}"


@_check("squeeze")
def _squeezes(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        if operation.type in ("squeeze", "expand_dims"):
            yield operation, f"from {graph.shape(operation, 'x')}"


def _at_attention(graph: Graph, reached: dict[str, list[Operation]]) -> bool:
    """A product of two computed tensors, or a softmax, is among them (x @ weights is a linear layer)."""
    operations = [operation for type in _ATTENTION for operation in reached.get(type, [])]
    return any(item.type not in _PRODUCTS or len(graph.live(item)) == 2 for item in operations)


@_check("reshape")
def _reshapes(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    interface = frozenset({"cast", "transpose"})
    for operation in graph.operations:
        if operation.type != "reshape":
            continue
        leads = graph.reached(operation, _MOVES | _CUTS | _ELEMENTWISE | {"reshape"}, forward=True)
        comes = graph.reached(operation, _MOVES | _CUTS | {"reshape"}, forward=False)
        at_output = OUTPUT in graph.reached(operation, interface, forward=True)
        at_input = INPUT in graph.reached(operation, interface, forward=False)
        if not (at_output or at_input or _at_attention(graph, leads) or _at_attention(graph, comes)):
            yield operation, f"from {graph.shape(operation, 'x')}"


@_check("reshape-chain")
def _chains(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        if operation.type == "reshape":
            earlier = graph.reached(operation, _MOVES, forward=False).get("reshape", [])
            if earlier:
                yield operation, f"only moves data since {earlier[0].name}"


@_check("layer-norm-decomposed")
def _decomposed(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    """reduce_mean, sub, square (or mul with itself, or pow), and behind it a root: (x - mean) / sqrt(variance)."""
    for mean in graph.operations:
        if mean.type != "reduce_mean":
            continue
        for centred in graph.consumers.get(mean.outputs[0].name, []):
            of_same = set(graph.live(centred)) == {mean.outputs[0].name, *graph.live(mean)}
            if centred.type == "sub" and of_same and _is_normalized(graph, centred):
                yield mean, "the mean of a normalization: sub, square, mean, root and division follow one by one"


def _is_normalized(graph: Graph, centred: Operation) -> bool:
    for square in graph.consumers.get(centred.outputs[0].name, []):
        if square.type in ("square", "pow") or (square.type == "mul" and len(graph.live(square)) == 1):
            behind = graph.reached(square, frozenset({"reduce_mean", "reduce_sum", "add", "mul", "real_div"}), True)
            if behind.keys() & {"reduce_mean", "reduce_sum"} and behind.keys() & {"rsqrt", "sqrt", "pow"}:
                return True
    return False


@_check("layer-norm-transposed")
def _wrapped(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation, transposes in _norm_transposes(graph).values():
        yield operation, f"axes {graph.value(operation, 'axes')} between {', '.join(item.name for item in transposes)}"


def _spatial(shape: tuple[int | None, ...] | None) -> list[int]:
    return [size for size in (shape or ())[2:] if size is not None]


def _is_global(graph: Graph, operation: Operation) -> bool:
    kernel, picture = graph.value(operation, "kernel_sizes"), _spatial(graph.shape(operation, "x"))
    return operation.type in _POOLS and bool(kernel) and list(kernel) == picture and max(picture) > 1


@_check("large-kernel")
def _kernels(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        pool = operation.type in _POOLS
        if not (pool or operation.type in _CONVOLUTIONS) or _is_global(graph, operation):
            continue
        kernel = graph.value(operation, "kernel_sizes", []) if pool else _spatial(graph.shape(operation, "weight"))
        dilations = graph.value(operation, "dilations") or [1] * len(kernel)
        extents = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations)]
        strides = (graph.value(operation, "strides") or [1]) if pool else [1]
        if max(extents, default=1) > threshold["kernel"]:
            yield operation, f"kernel {' x '.join(map(str, extents))}, dilation included"
        elif max(strides) > threshold["pool_stride"]:
            yield operation, f"pooling with strides {' x '.join(map(str, strides))}"


@_check("global-pool")
def _global_pools(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        if _is_global(graph, operation):
            kernel = " x ".join(map(str, graph.value(operation, "kernel_sizes")))
            yield operation, f"kernel {kernel} is its whole input; {_GLOBAL_POOL[operation.type]} is the same"


@_check("tensor-size")
def _sizes(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    def fault(type: TensorType) -> str | None:
        longest = max((size for size in type.shape if size is not None), default=0)
        return f"an axis of {longest}" if longest > threshold["axis"] else None

    return _each_value(graph, fault)


@_check("weights-size")
def _weights(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    stored = {key: size for item in graph.operations for key, (_, size) in graph.weights(item).items()}
    if sum(stored.values()) > threshold["bytes"]:
        yield graph.function.name, f"{format_bytes(sum(stored.values()))} of weights"


@_check("linear")
def _linears(graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    for operation in graph.operations:
        fixed = operation.type == "linear" or (operation.type == "matmul" and graph.is_constant(operation, "y"))
        shape = graph.shape(operation, "x") or ()
        if fixed and any(size != 1 for size in shape[:-1]):  # one vector has no positions to lay out
            yield operation, f"a product with weights over the last axis of {shape}"


def _opset(program: Program, graph: Graph, threshold: Mapping[str, Any]) -> Iterator[_Hit]:
    specification, opset = threshold["specification"], graph.function.opset
    for operation in graph.constants:
        needs = threshold["needs"].get(operation.type)
        keys = operation.inputs.keys() | operation.attributes.keys()
        if "shape" not in keys:
            needs = threshold["needs_without_shape"].get(operation.type, needs)
        if needs is None or opset not in specification:
            continue
        if specification[needs] > specification[opset] or specification[needs] > program.specification_version:
            deployed = f"{opset}, specification {program.specification_version}"
            yield operation, f"needs {needs} (specification {specification[needs]}), the function is {deployed}"
