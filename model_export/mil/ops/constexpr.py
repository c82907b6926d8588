"""Weights stored compressed: evaluated once, when the program is loaded, in the storage type of the result.

Semantics: coremltools defs `iOS16/constexpr_ops.py` and `iOS18/compression.py`.
"""

from __future__ import annotations

import torch

from ..blob import unpack
from ..dtypes import STORAGE
from ..registry import Kernel, Node, Unsupported, mil_op


def _tensor(node: Node, key: str) -> torch.Tensor:
    value = node.raw(key)
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{key} is not a constant tensor")
    return value


def _result(value: torch.Tensor) -> Kernel:
    return Kernel(lambda: value, (), exact=True)


@mil_op("constexpr_cast", since="CoreML6")
def constexpr_cast(node: Node) -> Kernel:
    return _result(_tensor(node, "source_val").to(STORAGE[node.const("output_dtype")]))


@mil_op("constexpr_affine_dequantize", since="CoreML6")
def constexpr_affine_dequantize(node: Node) -> Kernel:
    """scale * (quantized_data - zero_point), both scalars or vectors along one axis; computed in float32."""
    data, axis = _tensor(node, "quantized_data"), node.const("axis")
    shape = [1] * data.ndim
    shape[axis] = -1
    scale = _tensor(node, "scale").reshape(shape)
    zero_point = _tensor(node, "zero_point").reshape(shape)
    return _result(((data.float() - zero_point.float()) * scale.float()).to(scale.dtype))


@mil_op("constexpr_lut_to_dense", since="CoreML6")
def constexpr_lut_to_dense_16(node: Node) -> Kernel:
    """lut[index] with indices of log2(len(lut)) bits, packed from the least significant bit."""
    lut, packed, shape = _tensor(node, "lut"), _tensor(node, "indices"), node.const("shape")
    bits = (lut.numel() - 1).bit_length()
    if lut.numel() != 2**bits or bits not in (1, 2, 4, 6, 8):
        raise Unsupported(f"a table of {lut.numel()} entries")
    count = int(torch.tensor(shape).prod())
    indices = packed if bits == 8 else unpack(packed.numpy(), f"uint{bits}", count)
    return _result(lut[indices.long()].reshape(shape))


@mil_op("constexpr_sparse_to_dense", since="CoreML6")
def constexpr_sparse_to_dense_16(node: Node) -> Kernel:
    """Non-zero values where the packed bit mask is set."""
    values, shape = _tensor(node, "nonzero_data"), node.const("shape")
    count = int(torch.tensor(shape).prod())
    return _sparse(values, unpack(_tensor(node, "mask").numpy(), "uint1", count).reshape(shape))


@mil_op("constexpr_sparse_to_dense", since="CoreML8")
def constexpr_sparse_to_dense_18(node: Node) -> Kernel:
    """Non-zero values where the mask, a uint1 tensor, is set."""
    return _sparse(_tensor(node, "nonzero_data"), _tensor(node, "mask"))


def _sparse(values: torch.Tensor, mask: torch.Tensor) -> Kernel:
    if int(mask.sum()) != values.numel():
        raise Unsupported(f"{values.numel()} non-zero values for a mask with {int(mask.sum())} set bits")
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask.bool()] = values
    return _result(dense)


def _spread(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each entry repeated over its block, so that the leading dimensions become `shape`."""
    for axis, size in enumerate(shape):
        if size % value.shape[axis]:
            raise Unsupported(f"blocks of {list(value.shape)} in {list(shape)}")
        value = value.repeat_interleave(size // value.shape[axis], axis) if size != value.shape[axis] else value
    return value


@mil_op("constexpr_blockwise_shift_scale", since="CoreML8")
def constexpr_blockwise_shift_scale(node: Node) -> Kernel:
    """scale * (data - offset) per block, in the scale's type as coremltools' decompress."""
    data, scale = _tensor(node, "data"), _tensor(node, "scale")
    shifted = data.to(scale.dtype)
    if node.has("offset"):
        shifted = shifted - _spread(_tensor(node, "offset").to(scale.dtype), data.shape)
    return _result(_spread(scale, data.shape) * shifted)


@mil_op("constexpr_lut_to_dense", since="CoreML8")
def constexpr_lut_to_dense_18(node: Node) -> Kernel:
    """lut (*groups, entries, vector)[index], a table per group; a vector fills consecutive places of vector_axis."""
    indices, lut = _tensor(node, "indices"), _tensor(node, "lut")
    vector = lut.shape[-1]
    axis = node.const("vector_axis", -1) % indices.ndim
    result = torch.empty(*indices.shape, vector, dtype=lut.dtype)
    groups = torch.cartesian_prod(*[torch.arange(n) for n in lut.shape[:-2]]).reshape(-1, indices.ndim).tolist()
    blocks = [size // count for size, count in zip(indices.shape, lut.shape)]
    for group in groups:
        part = tuple(slice(g * b, (g + 1) * b) for g, b in zip(group, blocks))
        result[part] = lut[tuple(group)][indices[part].long()]
    # The vector's elements come after the index's place along the axis.
    return _result(result.movedim(-1, axis + 1).flatten(axis, axis + 1))
