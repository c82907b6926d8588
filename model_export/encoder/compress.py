"""Compressed weights in the encoder's program: which layer gets which form, and the operations that decode it.

A form is one of `quantization.coreml.compression`. The program keeps a `constexpr_*` operation where the weight was;
Core ML decodes it when it loads, or on the fly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.common.errors import CheckFailed, UserError
from model_export.encoder.coreml import coremltools
from model_export.encoder_forms import VisionQuant
from quantization.coreml.compression import Compressed, Compression, applies, compress, nbytes
from quantization.coreml.palettes import Palette, per_channel

if TYPE_CHECKING:
    from torch import nn  # read by `config`, so by every command: torch is imported where it is needed

# A weight below this share of the encoder's bytes stays in float16: it saves nothing, and the small ones (depthwise
# kernels, the stem) are the ones that cost most.
_WORTHWHILE = 1e-4
_CAST = "_to_fp16"  # what coremltools appends to the name of a constant that it casts


@dataclass(frozen=True)
class Assignment:
    """Layer -> form, and layer -> why it stays fp16."""

    forms: Mapping[str, Compression]
    uncompressed: Mapping[str, str]


def weights(fastvit: "nn.Module") -> dict[str, np.ndarray]:
    """Layer name -> float16 weight (O, I, kh, kw) of every convolution of a prepared encoder (see `vision`)."""
    from torch import nn

    return {name: _half(layer) for name, layer in fastvit.named_modules() if isinstance(layer, nn.Conv2d)}


def _half(layer: Any) -> np.ndarray:
    return layer.weight.detach().half().numpy()


def layer_shapes(fastvit: "nn.Module") -> dict[str, tuple[int, ...]]:
    """Layer name -> shape of its weight as a convolution, of a folded encoder (also on the meta device)."""
    from torch import nn

    return {
        name: (*layer.weight.shape, *[1] * (4 - layer.weight.ndim))
        for name, layer in fastvit.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def assign(quant: VisionQuant, shapes: Mapping[str, tuple[int, ...]]) -> Assignment:
    """Resolve the rules for layers of these shapes; without rules, nothing is compressed and nothing has a reason.

    Raises UserError with every pattern that matches no layer.
    """
    unused = [glob for glob, _ in quant.rules if not any(fnmatchcase(name, glob) for name in shapes)]
    if unused:
        raise UserError(
            f"--vision-quant {quant.name}: matches no layer: {', '.join(unused)}; a layer is {next(iter(shapes))}"
        )
    forms, uncompressed = {}, {}
    for name, shape in shapes.items() if quant.rules else ():
        glob, form = next((rule for rule in quant.rules if fnmatchcase(name, rule[0])), (None, None))
        if form is None:
            uncompressed[name] = "no rule matches it" if glob is None else f"the rule {glob} says so"
        elif fault := fault_of(shape, form, shapes):
            uncompressed[name] = fault
        else:
            forms[name] = form
    return Assignment(forms, uncompressed)


def fault_of(shape: tuple[int, ...], form: Compression, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The reason why a layer stays fp16 under a form, or None."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    if np.prod(shape) < _WORTHWHILE * total:
        return f"{np.prod(shape)} weights, less than {_WORTHWHILE:.0e} of the encoder's: nothing to save"
    return applies(shape, form)


def size_of(shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, Compression]) -> int:
    """Bytes of all these weights, those without a form in float16."""
    return sum(
        nbytes(shape, forms[name]) if name in forms else 2 * int(np.prod(shape)) for name, shape in shapes.items()
    )


def compressed(fastvit: "nn.Module", forms: Mapping[str, Compression]) -> dict[str, Compressed]:
    """Each layer's weight in its form. Raises CheckFailed with every one that float16 cannot hold."""
    halves = {name: _half(fastvit.get_submodule(name)) for name in forms}
    check_finite(halves)
    return {name: compress(halves[name], form) for name, form in forms.items()}


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise CheckFailed with every layer whose weights overflowed float16."""
    if infinite := [name for name, weight in tensors.items() if not np.isfinite(weight).all()]:
        raise CheckFailed(f"weights do not fit float16, compressed or not: {', '.join(infinite)}")


def store(program: Any, stored: Mapping[str, Compressed], target: str) -> None:
    """Put constexpr operations in the place of convolution weights of a coremltools program, in place.

    `stored` by layer name; `target` is the program's deployment target.

    Raises CheckFailed when a weight isn't there.
    """
    coremltools()
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.scope import ScopeInfo

    block = program.functions["main"]
    consts = {operation.name: operation for operation in block.operations if operation.op_type == "const"}
    constants = {name: consts[constant_name(name)] for name in stored if constant_name(name) in consts}
    if missing := [name for name in stored if name not in constants]:
        raise CheckFailed(f"compressed weights with no place in the program: {', '.join(missing)}")
    with block:
        for name, weight in stored.items():
            old = constants[name]
            # coremltools asks every operation where in the source it came from: where the weight did.
            origin = [ScopeInfo(source=source, data=data[:1]) for source, data in old.scopes.items()]
            with Builder.scope(*origin):
                new_name = f"{old.name}_{weight.scheme.name.replace('-', '_')}"
                new = _decoder(Builder, weight, target, before=old, name=new_name)
            if new.shape != old.outputs[0].shape or new.dtype != old.outputs[0].dtype:
                raise CheckFailed(f"{name}: decodes to {new.dtype} {new.shape}, was {old.outputs[0].shape}")
            block.replace_uses_of_var_after_op(
                anchor_op=new.op, old_var=old.outputs[0], new_var=new, force_replace=True
            )
            block.remove_ops([old])


def constant_name(layer: str) -> str:
    """coremltools' name of a layer's float16 weight: torch.export's name of the parameter, and a suffix."""
    return f"p_fastvit_{layer.replace('.', '_')}_weight{_CAST}"


def _decoder(builder: Any, weight: Compressed, target: str, before: Any, name: str) -> Any:
    """The operation that decodes a weight: iOS 18's forms there, iOS 16's before."""
    stored, bits, at = weight.stored, weight.scheme.bits, {"before_op": before}
    newer = target >= "iOS18"
    if not isinstance(stored, Palette):
        if not newer:
            zero = np.zeros(len(stored.scale), np.int8)
            return builder.constexpr_affine_dequantize(
                quantized_data=stored.data, scale=stored.scale, zero_point=zero, axis=np.int32(0), name=name, **at
            )
        rank = stored.data.ndim
        scale = stored.scale if stored.scale.ndim == rank else per_channel(stored.scale, rank)
        return builder.constexpr_blockwise_shift_scale(
            data=_narrow(stored.data, f"int{bits}"), scale=scale, name=name, **at
        )
    shape = stored.indices.shape
    if not newer:
        return builder.constexpr_lut_to_dense(
            indices=_packed(stored.indices, bits), lut=stored.lut[0], shape=np.array(shape, np.uint32), name=name, **at
        )
    tables = stored.lut.reshape(len(stored.lut), *[1] * (len(shape) - 1), -1, 1)
    indices = _narrow(stored.indices, f"uint{bits}")
    if stored.scale is None:
        return builder.constexpr_lut_to_dense(indices=indices, lut=tables, name=name, **at)
    plain = builder.constexpr_lut_to_dense(indices=indices, lut=tables, name=f"{name}_palette", **at)
    return builder.constexpr_blockwise_shift_scale(
        data=plain, scale=per_channel(stored.scale, len(shape)), name=name, **at
    )


def _narrow(values: np.ndarray, name: str) -> np.ndarray:
    """The array in coremltools' type of that name, which marks sub-byte integers."""
    from coremltools.converters.mil.mil import types

    return values.astype(types.nptype_from_builtin(getattr(types, name)))


def _packed(indices: np.ndarray, bits: int) -> np.ndarray:
    """Indices packed from the least significant bit, as iOS 16's operation has them."""
    if bits == 8:
        return indices.ravel()
    stream = (indices.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.ravel(), bitorder="little")
