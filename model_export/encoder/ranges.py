"""How large the encoder's values get, operation by operation, and how much room float16 leaves them.

Measured in float32, in which an overflow of float16 is seen and not hidden: on a package with the MIL executor, on a
checkpoint with the exported graph of its folded encoder, and for an export, quickly, module by module.
"""

import math
import operator
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.layers import LayerNorm2d
from timm.models.fastvit import Attention, AttentionBlock
from torch import fx, nn

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.errors import UserError
from model_export import mil
from model_export.encoder import fp16
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.fp16 import LARGEST, SMALLEST_NORMAL
from model_export.encoder.graph import folded_encoder, graph
from model_export.mil import registry
from model_export.mil.allocator import give_back
from model_export.mil.blob import WeightFile, immediate
from model_export.mil.program import BlobRef, Constant, Operation
from model_export.mil.types import NUMPY

_TILE = 1 << 18  # elements looked at a time for subnormals: they and their magnitudes stay in the cache
_TWO_WORDS = ("final_conv", "pos_emb", "reparam_conv", "token_mixer")  # parts of timm's names with a "_" of their own
Advance = Callable[[], Any]


@dataclass(frozen=True)
class Range:
    """What one operation, or module, holds at its largest over the pictures.

    `type` is the operation's in its graph; `layer` timm's name of the module that it belongs to, None if unknown;
    `dtype` what a package keeps the value in ("fp16" in a graph, which is what an export would make of it).

    largest: the largest magnitude. square: the largest (x - mean)^2 inside a LayerNorm, which a processor that takes it
    apart has to hold; 0 without one. subnormal: of the values that are not zero, the share under 2^-14, which float16
    holds with fewer bits or not at all. weight_subnormal: the same of the operation's own weights, 0 without any.
    exponent: k where an export would carry x / 2^k instead (see `model_export.encoder.fp16`); of a checkpoint only.
    """

    name: str
    type: str
    layer: str | None
    largest: float
    square: float = 0.0
    subnormal: float = 0.0
    weight_subnormal: float = 0.0
    dtype: str = "fp16"
    exponent: int = 0

    @property
    def headroom(self) -> float:
        """65504 / largest: under 1 is an overflow; infinite where all values are zero."""
        return LARGEST / self.largest if self.largest else math.inf

    @property
    def square_headroom(self) -> float:
        """65504 / square; infinite without a LayerNorm."""
        return LARGEST / self.square if self.square else math.inf

    @property
    def exported_headroom(self) -> float:
        """65504 / what an export holds of the largest value."""
        return self.headroom * 2.0**self.exponent


@dataclass
class _Tally:
    """One operation's figures, gathered picture by picture."""

    name: str
    type: str
    layer: str | None
    largest: float = 0.0
    square: float = 0.0
    small: int = 0
    nonzero: int = 0
    weight_subnormal: float = 0.0
    dtype: str = "fp16"

    def see(self, values: torch.Tensor) -> None:
        self.largest = max(self.largest, largest(values, self.name))
        small, nonzero = _count_small(values)
        self.small, self.nonzero = self.small + small, self.nonzero + nonzero

    def see_norm(self, values: torch.Tensor, axes: tuple[int, ...]) -> None:
        self.square = max(self.square, largest_square(values, axes))

    def range(self) -> Range:
        share = self.small / max(self.nonzero, 1)
        return Range(
            self.name, self.type, self.layer, self.largest, self.square, share, self.weight_subnormal, self.dtype
        )


def largest(values: torch.Tensor, name: str) -> float:
    """max |values| of floats, 0.0 of none. Raises UserError, with `name`, for what is not finite."""
    if not values.numel():
        return 0.0
    low, high = (float(bound) for bound in _in_memory_order(values).aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}: not finite even in float32 (from {low} to {high}): the weights are damaged")
    return max(-low, high)


def largest_square(values: torch.Tensor, axes: tuple[int, ...]) -> float:
    """max (x - mean)^2 with the mean over `axes`, in float64: what a LayerNorm over them has to square."""
    mean = values.mean(axes, dtype=torch.float64)
    deviation = torch.maximum(values.amax(axes).double() - mean, mean - values.amin(axes).double())
    return float(deviation.max()) ** 2


def subnormal_share(tensors: Iterable[torch.Tensor]) -> float:
    """Of the values of all tensors that are not zero, the share under 2^-14 in magnitude; 0.0 where all are zero."""
    counts = [_count_small(tensor) for tensor in tensors]
    return sum(small for small, _ in counts) / max(sum(nonzero for _, nonzero in counts), 1)


def _count_small(values: torch.Tensor) -> tuple[int, int]:
    """How many are under 2^-14 and not zero; how many are not zero."""
    under = nonzero = 0
    for tile in _in_memory_order(values).reshape(-1).split(_TILE):
        under += int(torch.count_nonzero(tile.abs() < SMALLEST_NORMAL))
        nonzero += int(torch.count_nonzero(tile))
    return under - (values.numel() - nonzero), nonzero


def _in_memory_order(values: torch.Tensor) -> torch.Tensor:
    """The same values with axes ordered as they lie in memory, so that looking at all of them copies none."""
    return values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))


# An export: by module


def measure_modules(encoder: nn.Module, pixels: Iterable[np.ndarray]) -> dict[str, Range]:
    """The output of every module of a folded timm FastViT, by module name in order of execution.

    pixels: arrays (1, 3, S, S) float32. Layers have the name that timm gives them (`stages.3.blocks.0.mlp.fc2`), a
    block or a stage is what leaves it. `stages.3.blocks.0.mlp:input` is an attention block's stream between its two
    branches; of `stages.3.blocks.0.token_mixer`, `:queries` (over the root of the head's size), `:keys`, `:values` and
    `:scores`, what its softmax gets: no module puts them out. A LayerNorm has the largest square of its input. Shares
    of subnormals are not measured: this is an encoding and one look at each value a picture (5 % of the time at 1024 x
    1024).

    Raises UserError for values that are not finite in float32, and for no pixels at all.
    """
    tallies: dict[str, _Tally] = {}
    # The tensor seen last, kept no longer than the encoder keeps it; its version (of in-place changes); its figure.
    last: tuple[Callable[[], torch.Tensor | None], int, float] = (lambda: None, 0, 0.0)

    def see(name: str, module: nn.Module, values: torch.Tensor) -> _Tally:
        nonlocal last
        if values is not last[0]() or values._version != last[1]:  # a container puts out what its last child did
            last = weakref.ref(values), values._version, largest(values, name)
        tally = tallies.setdefault(name, _Tally(name, type(module).__name__, name.partition(":")[0]))
        tally.largest = max(tally.largest, last[2])
        return tally

    def after(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        tally = see(name, module, output)
        if isinstance(module, nn.LayerNorm):
            tally.see_norm(inputs[0], _axes(module))

    def before(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(f"{name}:input", module, inputs[0])

    def products(name: str, attention: Attention, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        heads = output.unflatten(-1, (3, attention.num_heads, attention.head_dim)).movedim(1, -2)
        for head in range(attention.num_heads):  # one at a time: all together take 100 MB at 1024 x 1024
            q, k, v = heads[:, :, head].unbind(1)
            q = q * attention.scale
            for part, values in (("queries", q), ("keys", k), ("values", v), ("scores", q @ k.mT)):
                see(f"{name}:{part}", layer, values)

    handles = []
    for name, module in encoder.named_modules():
        if name and not isinstance(module, (nn.Identity, nn.Dropout)):
            handles.append(module.register_forward_hook(partial(after, name)))
        if isinstance(module, Attention):
            handles.append(module.qkv.register_forward_hook(partial(products, name, module)))
        if isinstance(module, AttentionBlock):
            handles.append(module.mlp.register_forward_pre_hook(partial(before, f"{name}.mlp")))
    try:
        with torch.no_grad():
            for array in pixels:
                # Convolutions are quicker on channels-last values: those of other values are reordered at each.
                values = torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
                encoder.forward_features(values)  # type: ignore[operator]
                give_back()  # or what one picture has split would stay beside what the next one needs
    finally:
        for handle in handles:
            handle.remove()
    return {tally.name: tally for tally in _finished(tallies)}


def _axes(norm: nn.LayerNorm) -> tuple[int, ...]:
    """The axes that it normalizes: channels of (B, C, H, W) in timm's LayerNorm2d, else the last ones."""
    return (1,) if isinstance(norm, LayerNorm2d) else tuple(range(-len(norm.normalized_shape), 0))


def _finished(tallies: Mapping[str, _Tally]) -> list[Range]:
    if not tallies:
        raise UserError("no picture to measure the encoder's values on: expected one or more")
    return [tally.range() for tally in tallies.values()]


# A checkpoint: by operation of the exported graph


def measure_checkpoint(
    checkpoint: Checkpoint, image_size: int, pixels: Iterable[np.ndarray], advance: Advance = lambda: None
) -> list[Range]:
    """Every operation of a checkpoint's folded encoder, in order of execution, before any rescaling, with the exponents
    that an export would choose by these pictures.

    pixels: arrays (1, 3, image_size, image_size) float32. `advance()` after each.
    Raises UserError as `measure_modules`.
    """
    fastvit = channel_first(folded_encoder(checkpoint)[0])
    found = measure_graph(graph(Encoder(fastvit), image_size), pixels, advance)
    places = _places(found)
    exponents = fp16.choose(fastvit, _at_places(places, found)).exponents()
    return [replace(one, exponent=exponents.get(place, 0)) for place, one in zip(places, found)]


def _places(ranges: Iterable[Range]) -> list[str]:
    """The name that `measure_modules` gives what each operation of a channel-first graph puts out."""
    places: list[str] = []
    for one in ranges:
        place, part = one.layer or "", one.name.partition(":")[2]
        if one.type == "matmul" and f"{place}:scores" not in places:  # the first of an attention's two
            part = "scores"
        elif one.type == "gelu" and not place.endswith(".mlp.act"):
            place = place.removesuffix(".act")  # it ends its block
        places.append(f"{place}:{part}" if part else place)
    return places


def _at_places(places: Iterable[str], ranges: Iterable[Range]) -> dict[str, Range]:
    """Ranges by place, the largest of each. An attention block's two additions are both its stream."""
    found: dict[str, Range] = {}
    for place, one in zip(places, ranges):
        before = found.get(place, one)
        found[place] = replace(one, largest=max(before.largest, one.largest), square=max(before.square, one.square))
    blocks = {place: one for place, one in found.items() if f"{place}.mlp.fc2" in found}
    return found | {f"{place}.mlp:input": one for place, one in blocks.items()}


def measure_graph(
    program: torch.export.ExportedProgram, pixels: Iterable[np.ndarray], advance: Advance = lambda: None
) -> list[Range]:
    """Every operation of an exported encoder, in order of execution.

    A fused attention (`scaled_dot_product_attention`) is preceded by `NAME:scores`, the products that its softmax gets.
    """
    watched = _Watched(program)
    with torch.no_grad():
        for array in pixels:
            watched.run(torch.from_numpy(array))
            advance()
    return _finished(watched.tallies)


class _Watched(fx.Interpreter):
    """Runs a graph and tallies the floats that each operation gives; values are freed after their last use."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__(program.module(check_guards=False))
        self.tallies: dict[str, _Tally] = {}
        self._norms: dict[str, list[fx.Node]] = {}  # the elementary operations of a LayerNorm, by module
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if (found := module_of(node))[1].endswith("ChannelNorm"):
                self._norms.setdefault(found[0], []).append(node)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the graph, and look at what it gives."""
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        norm = self._norms.get(module_of(n)[0], [])
        kind = kind_of(n)
        if kind == "layer_norm" or n in norm[:1]:
            self._norm_input = self.env[n.args[0]]  # type: ignore[index]
        if kind == "scaled_dot_product_attention":
            q, k = (self.env[argument] for argument in n.args[:2])  # type: ignore[index]
            scale = n.kwargs.get("scale") or q.shape[-1] ** -0.5
            self._tally(n, ":scores", "matmul").see(q * scale @ k.transpose(-2, -1))
        result = super().run_node(n)
        values = [value for value in _several(result) if isinstance(value, torch.Tensor) and value.is_floating_point()]
        if not values or n in norm[:-1]:
            return result
        tally = self._tally(n, "", "layer_norm" if norm else kind)
        if kind == "split":  # an attention's: FastViT has no other
            for part, value in zip((":queries", ":keys", ":values"), values, strict=True):
                self._tally(n, part, kind).see(value)
        for value in values:
            tally.see(value)
        if norm or kind == "layer_norm":
            axes = (1,) if norm else tuple(range(-len(n.args[1]), 0))  # type: ignore[arg-type]
            tally.see_norm(self._norm_input, axes)
        return result

    def _tally(self, node: fx.Node, suffix: str, kind: str) -> _Tally:
        name = node.name + suffix
        if name not in self.tallies:
            constants = [self.fetch_attr(str(other.target)) for other in node.all_input_nodes if other.op == "get_attr"]
            layer = layer_name(module_of(node)[0])
            self.tallies[name] = _Tally(name, kind, layer, weight_subnormal=subnormal_share(_weights(constants)))
        return self.tallies[name]


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and class of the innermost module that a node comes from."""
    path, kind = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1]
    return path, kind if isinstance(kind, str) else kind.__name__


def kind_of(node: fx.Node) -> str:
    """The name of a node's ATen operation."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _weights(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors of floats among an operation's constants; not its scalars, which are parameters."""
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()]


def layer_name(text: str) -> str | None:
    """timm's name of a layer from a module's path, or from the name that coremltools gives its weight; None if neither.

    `fastvit.stages.3.pos_emb` and `p_fastvit_stages_3_pos_emb_weight_to_fp16` are both `stages.3.pos_emb`.
    """
    found = re.search(r"(?:^|[._])((?:stem|stages|final_conv)(?:[._].*)?$)", text)
    if found is None or "." in found[1]:
        return found and found[1]
    path = re.sub(r"_(weight|bias)(_.*)?$", "", found[1]).replace("_", ".")
    for words in _TWO_WORDS:
        path = path.replace(words.replace("_", "."), words)
    return path


# A package: by operation of the saved program


def measure_package(
    executor: mil.MILExecutor, pixels: Iterable[np.ndarray], advance: Advance = lambda: None
) -> list[Range]:
    """Every operation of a package's function that gives floats, in order of execution.

    executor: loaded with compute="float32". pixels: arrays of its one input's shape, cast to its type. `advance()`
    after each. Raises UserError as `measure_modules`, MILError as the executor.
    """
    ((input_name, input_type),) = executor.inputs.items()
    constants = _Constants(executor)
    tallies: dict[str, _Tally] = {}
    norms = {op.name: constants.norm(op) for op in executor.operations if op.type == "layer_norm"}
    sources = {source for source, _ in norms.values()}
    kept: dict[str, torch.Tensor] = {}  # what a LayerNorm reads

    def watch(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        kept.update({name: value for name, value in outputs.items() if name in sources})
        floats = [value for value in outputs.values() if value.is_floating_point()]
        if floats and operation.name not in tallies:
            tallies[operation.name] = constants.tally(operation)
        for value in floats:
            tallies[operation.name].see(value)
        if operation.name in norms:
            source, axes = norms[operation.name]
            tallies[operation.name].see_norm(kept[source], axes)

    for array in pixels:
        array = array.astype(NUMPY[input_type.dtype])
        kept[input_name] = torch.from_numpy(array)
        executor.run({input_name: array}, watch=watch)
        kept.clear()
        advance()
    return _finished(tallies)


class _Constants:
    """What a function's operations have at load: weights, whatever form they are stored in, and parameters."""

    def __init__(self, executor: mil.MILExecutor) -> None:
        self._executor = executor
        self._makers = {
            output.name: operation
            for operation in executor.function.block.operations
            if operation.type == "const" or operation.type.startswith("constexpr_")
            for output in operation.outputs
        }
        self._types = {output.name: output.type for maker in self._makers.values() for output in maker.outputs}

    def norm(self, operation: Operation) -> tuple[str, tuple[int, ...]]:
        """A layer_norm's input, and the axes that it normalizes (default: all)."""
        node, source = self._node(operation), operation.inputs["x"][0]
        rank = len(operation.outputs[0].type.shape) if operation.outputs[0].type else 0
        return str(source), tuple(node.const("axes", list(range(rank))))

    def tally(self, operation: Operation) -> _Tally:
        """An empty tally; its layer is that of the first weight whose name says so."""
        names = [item for items in operation.inputs.values() for item in items if isinstance(item, str)]
        constants = [self._get(name) for name in names]
        layers = (layer_name(name) for name in names if name in self._makers)
        type = operation.outputs[0].type
        return _Tally(
            operation.name,
            operation.type,
            next((layer for layer in layers if layer), None),
            weight_subnormal=subnormal_share(_weights(constants)),
            dtype=type.dtype if type else "",
        )

    def _node(self, operation: Operation) -> registry.Node:
        return registry.Node(operation, dict(self._types), self._get, self._load, self._executor.policy)

    def _get(self, name: str) -> Any:
        maker = self._makers.get(name)
        if maker is None:
            return None
        if maker.type == "const":
            return self._load(maker.attributes["val"])
        builder = registry.lookup(maker.type, self._executor.function.opset)
        assert builder is not None  # or the executor would have refused the program
        return _several(builder(self._node(maker)).run())[[output.name for output in maker.outputs].index(name)]

    def _load(self, constant: Constant) -> Any:
        if not isinstance(constant.data, BlobRef):
            return immediate(constant)
        return WeightFile(constant.data.file).read(constant.data.offset, constant.type)
