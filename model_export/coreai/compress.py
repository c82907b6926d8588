"""Compressed weights in a Core AI program: PyTorch modules whose weight is decoded by Core AI's own operations.

A form is one of `quantization.coreai.forms`. A layer keeps its class and its settings, and holds the parts as buffers,
whose names (`indices`, `lut`, `data`) coreai-torch reads to pack values of less than 8 bits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.errors import UserError
from model_export.coreai.modules import Embedding
from model_export.encoder.compress import layer_shapes
from quantization.coreai.forms import Form, Parts, e4m3_values, fault, store
from quantization.coreai.listing import language_shapes
from quantization.coreai.plan import VISION, Plan, plan
from quantization.recipe import Recipe, named_recipes


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape (O, I, ...) of every weight of a module that could take a form ("" is the module itself)."""
    return {path: tuple(layer.weight.shape) for path, layer in _layers(module)}


def plan_of(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """A recipe's forms for a bundle's weights.

    Args:
        shapes: of all three parts (`bundle_shapes`).

    Raises:
        UserError: the recipe has no Core AI forms, or some of its patterns match no weight.
    """
    if not recipe.coreai:
        known = ", ".join(name for name, other in named_recipes().items() if other.coreai)
        raise UserError(f'recipe {recipe.name}: has no Core AI forms: expected {known}, or one with a key "coreai"')
    return plan(recipe.coreai, shapes)


def bundle_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a bundle's weights under the names that recipes have for them, from the checkpoint's headers."""
    from fastvlm.model.build import folded_skeleton

    tensors = {naming.to_artefact(name): info.shape for name, info in checkpoint.tensors.items()}
    shapes = language_shapes({name: shape for name, shape in tensors.items() if name is not None})
    encoder = layer_shapes(folded_skeleton(checkpoint))
    shapes |= {f"{VISION}fastvit.{name}": shape for name, shape in encoder.items()}
    for ours, theirs in (("linear_0", "linear_1"), ("linear_2", "linear_2")):
        shapes[VISION + ours] = (*checkpoint.tensors[f"{naming.PROJECTOR}{theirs}.weight"].shape, 1, 1)
    return shapes


def compress(module: nn.Module, forms: Mapping[str, Form]) -> dict[str, str]:
    """Store weights of a module in these forms, in place, one layer at a time.

    Args:
        module: in float16, or in float32 for a twin: its weights are rounded to float16 first.
        forms: path -> form (`Plan.of`).

    Returns:
        Path -> reason of the layers that stay as they are because the form can't hold them.

    Raises:
        UserError: with every path that is no layer, and every layer whose weight float16 can't hold.
    """
    import coreai_torch._compression.custom_layers  # noqa: F401  registers torch.ops.coreai

    layers = dict(_layers(module))
    faults = [f"{path}: no such layer" for path in forms if path not in layers]
    kept = {}
    for path, form in forms.items():
        if path not in layers:
            continue
        layer = layers[path]
        if reason := fault(tuple(layer.weight.shape), form) or _embedding_fault(layer, form):
            kept[path] = reason
        elif not (weight := layer.weight.detach().half()).isfinite().all():
            faults.append(f"{path}: values beyond float16")
        else:
            _replace(layer, form, weight.numpy())
    if faults:
        raise UserError(f"cannot compress: {'; '.join(faults)}")
    return kept


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    kinds = (nn.Linear, nn.Conv2d, Embedding)
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, kinds)]


def _embedding_fault(layer: nn.Module, form: Form) -> str | None:
    width = 4  # values of less than 8 bits that fill whole bytes, whatever their number of bits
    if isinstance(layer, Embedding) and layer.weight.shape[1] % width:
        return f"rows of {layer.weight.shape[1]} do not divide into whole bytes"
    return None


def _replace(layer: Any, form: Form, weight: np.ndarray) -> None:
    """Put the parts in the place of a layer's weight."""
    dtype = layer.weight.dtype
    parts = store(weight, form)
    del layer.weight
    # As `torch.nn.utils.parametrize` does it: the layer stays what it is, under a class with another weight.
    kind = type(layer)
    layer.__class__ = _Embedding if kind is Embedding else type(f"Compressed{kind.__name__}", (_Compressed, kind), {})
    layer.hold(parts, form, dtype)


class _Compressed(nn.Module):
    """A layer whose weight is a property: decoded where the layer asks for it."""

    form: Form

    def hold(self, parts: Parts, form: Form, dtype: torch.dtype) -> None:
        """Take the parts as buffers; the program computes in `dtype`."""
        self.form = form
        for name, part in parts.items():
            tensor = torch.from_numpy(part)
            if name in ("scale", "lut"):
                tensor = tensor.to(dtype)
            elif form.kind == "float":
                tensor = tensor.view(torch.float8_e4m3fn)
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The weight, in the scale's or the table's dtype."""
        operations = torch.ops.coreai
        if self.form.kind == "palette":
            return operations.lut_to_dense(self.indices, self.lut, 0)
        # The dtype of the data, which tells Core AI how to pack it; E4M3 says it by itself.
        packed = getattr(torch, f"int{self.form.bits}") if self.form.kind == "integer" else None
        return operations.constexpr_blockwise_shift_scale(self.data, self.scale, None, None, packed, self.scale.dtype)


class _Embedding(_Compressed, Embedding):  # type: ignore[misc]  # a property in the place of a parameter
    """Gathers the stored rows, and decodes only those.

    Core AI gathers whole bytes, so values of less than 8 bits are packed here: `plane4` has 4 bits of two values in a
    byte, `plane2` the last 2 bits of four. A plane's byte k of a row holds the values k, k + K, ... with K bytes a row.
    """

    def hold(self, parts: Parts, form: Form, dtype: torch.dtype) -> None:
        self.form = form
        if form.kind == "palette":
            codes = parts["indices"]
            self.register_buffer("table", torch.from_numpy(parts["lut"].reshape(-1)).to(dtype))
            self.rows = len(codes) // len(parts["lut"])  # that share a palette
        else:
            codes = parts["data"]
            self.register_buffer("scale", torch.from_numpy(parts["scale"])[..., None].to(dtype))
            if form.kind == "float":
                values = np.nan_to_num(e4m3_values())
                self.register_buffer("table", torch.from_numpy(values).to(dtype))
        # Integers count from the least one, so that no plane has a sign.
        self.least = -(1 << (form.bits - 1)) if form.kind == "integer" else 0
        codes = codes.view(np.uint8) + np.uint8(-self.least)  # modulo 256
        self.planes = {8: (8,), 6: (4, 2), 4: (4,)}[form.bits]
        left = form.bits
        for bits in self.planes:
            left -= bits
            self.register_buffer(f"plane{bits}", torch.from_numpy(_pack((codes >> left) & ((1 << bits) - 1), bits)))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, q) int32 -> (1, q, H)."""
        codes: Any = 0
        parts: dict[str, Any] = dict(self.named_buffers())
        for bits in self.planes:
            packed = parts[f"plane{bits}"][input_ids].int()
            # Core AI has no shifts: division and remainder of numbers that are not negative.
            places = [torch.fmod(packed // (1 << shift), 1 << bits) for shift in range(0, 8, bits)]
            codes = codes * (1 << bits) + (torch.cat(places, -1) if bits < 8 else packed)
        if self.form.kind == "palette":
            return parts["table"][codes + (input_ids // self.rows)[..., None] * (1 << self.form.bits)]
        scale = parts["scale"][input_ids]
        values = parts["table"][codes] if self.form.kind == "float" else (codes + self.least).to(scale.dtype)
        blocks = values.unflatten(-1, (scale.shape[-2], -1))
        return (blocks * scale).flatten(-2)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Values (V, H) uint8 below 2**bits as bytes (V, H · bits / 8), as `_Embedding` says."""
    parts = np.split(values, 8 // bits, axis=1)
    packed = parts[0].copy()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed
