"""Weights stored compressed: evaluated once, when the program is loaded, in the storage type of the result.

Semantics: coremltools defs `iOS16/constexpr_ops.py` and `iOS18/compression.py`; an operand may be another one's result.
"""

import math

import torch

from ..blob import unpack
from ..dtypes import STORAGE
from ..registry import Kernel, Node, Unsupported, mil_op
from ..types import SUB_BYTE

# Indices looked up at a time: torch takes no narrower ones than int32, four times the size of the stored ones.
_CHUNK = 1 << 20


def _tensor(node: Node, key: str) -> torch.Tensor:
    value = node.raw(key)
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{key} is not a constant tensor")
    return value


def _optional(node: Node, key: str) -> torch.Tensor | None:
    return _tensor(node, key) if node.has(key) else None


def _result(*values: torch.Tensor) -> Kernel:
    return Kernel(lambda: values, (), exact=True)


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
    return _result(data.to(torch.float32, copy=True).sub_(zero_point.float()).mul_(scale.float()).to(scale.dtype))


# -- sparse -----------------------------------------------------------------------------------------------------------


def _dense(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeros, and the values in order where the mask is set."""
    places = mask.bool()
    if int(places.sum()) != values.numel():
        raise Unsupported(f"{values.numel()} non-zero values for a mask with {int(places.sum())} set bits")
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(places, values)


@mil_op("constexpr_sparse_to_dense", since="CoreML6")
def constexpr_sparse_to_dense_16(node: Node) -> Kernel:
    """Non-zero values where the packed bit mask is set."""
    values, shape = _tensor(node, "nonzero_data"), node.const("shape")
    mask = torch.from_numpy(unpack(_tensor(node, "mask").numpy(), "uint1", math.prod(shape)))
    return _result(_dense(values, mask.reshape(shape)))


@mil_op("constexpr_sparse_to_dense", since="CoreML8")
def constexpr_sparse_to_dense_18(node: Node) -> Kernel:
    """Non-zero values where the mask, a uint1 tensor, is set."""
    return _result(_dense(_tensor(node, "nonzero_data"), _tensor(node, "mask")))


# -- scales and offsets -----------------------------------------------------------------------------------------------


def _shift_scale(data: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """scale * (data - offset) per block, in the scale's type (wider while an offset is) as coremltools' decompress."""
    if scale.ndim != data.ndim or any(size % count for size, count in zip(data.shape, scale.shape)):
        raise Unsupported(f"scales {list(scale.shape)} for data {list(data.shape)}")
    # Every axis as (blocks, places in the block), the scale having one place in each.
    blocks = [n for size, count in zip(data.shape, scale.shape) for n in (count, size // count)]
    single = [n for count in scale.shape for n in (count, 1)]
    values = data.to(scale.dtype, copy=True).reshape(blocks)
    if offset is not None and offset.is_floating_point():
        values = values.to(torch.promote_types(scale.dtype, offset.dtype))
    if offset is not None:
        values.sub_(offset.to(values.dtype).reshape(single))
    return values.mul_(scale.reshape(single)).to(scale.dtype).reshape(data.shape)


@mil_op("constexpr_blockwise_shift_scale", since="CoreML8")
def constexpr_blockwise_shift_scale(node: Node) -> Kernel:
    """scale * (data - offset), a scale and an offset for each block."""
    return _result(_shift_scale(_tensor(node, "data"), _tensor(node, "scale"), _optional(node, "offset")))


@mil_op("constexpr_sparse_blockwise_shift_scale", since="CoreML8")
def constexpr_sparse_blockwise_shift_scale(node: Node) -> Kernel:
    """The mask, and scale * (value - offset) for the values where it is set."""
    mask = _tensor(node, "data_mask")
    dense = _dense(_tensor(node, "nonzero_data"), mask)
    return _result(mask, _shift_scale(dense, _tensor(node, "scale"), _optional(node, "offset"))[mask.bool()])


# -- palettes ---------------------------------------------------------------------------------------------------------


def _looked_up(lut: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
    """lut (*groups, entries, vector)[indices (*sizes)], a table per group; a vector fills consecutive places of `axis`.

    The result has the sizes of the indices, `axis` being `vector` times as long.
    """
    *groups, entries, vector = lut.shape
    if len(groups) != indices.ndim or any(size % count for size, count in zip(indices.shape, groups)):
        raise Unsupported(f"tables {list(lut.shape)} for indices {list(indices.shape)}")
    if math.prod(groups) == 1 and vector == 1:
        return _chunked(lut.reshape(-1), indices.reshape(-1), {}, 0).reshape(indices.shape)
    # All tables are one; where a place's table starts in it is a sum of one number per axis.
    starts, stride = {}, entries
    for place in reversed(range(indices.ndim)):
        if groups[place] > 1:
            each = torch.arange(groups[place], dtype=torch.int32) * stride
            each = each.repeat_interleave(indices.shape[place] // groups[place])
            starts[place] = each.reshape(-1, *[1] * (indices.ndim - 1 - place))
        stride *= groups[place]
    return _chunked(lut.reshape(-1, vector).squeeze(1), indices, starts, axis)


def _chunked(table: torch.Tensor, indices: torch.Tensor, starts: dict[int, torch.Tensor], axis: int) -> torch.Tensor:
    """table (rows,) or (rows, vector)[indices + starts, which lie along their axes], some of axis 0 at a time."""
    sizes = list(indices.shape)
    sizes[axis] *= table.shape[1] if table.ndim == 2 else 1
    result = torch.empty(sizes, dtype=table.dtype)
    factor = sizes[0] // max(indices.shape[0], 1)
    count = max(1, _CHUNK // max(math.prod(indices.shape[1:]), 1))
    for first in range(0, indices.shape[0], count):
        rows = indices[first : first + count].to(torch.int32)
        for place, start in starts.items():
            rows += start[first : first + count] if place == 0 else start
        looked_up = table.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *table.shape[1:])
        if table.ndim == 2:  # the vector's elements come after the index's place along the axis
            looked_up = looked_up.movedim(-1, axis + 1).flatten(axis, axis + 1)
        result[first * factor : (first + count) * factor] = looked_up
    return result


@mil_op("constexpr_lut_to_dense", since="CoreML6")
def constexpr_lut_to_dense_16(node: Node) -> Kernel:
    """lut[index] with indices of log2(len(lut)) bits, packed from the least significant bit."""
    lut, packed, shape = _tensor(node, "lut"), _tensor(node, "indices"), node.const("shape")
    bits = (lut.numel() - 1).bit_length()
    if lut.numel() != 2**bits or bits not in (1, 2, 4, 6, 8):
        raise Unsupported(f"a table of {lut.numel()} entries")
    if bits < 8:
        packed = torch.from_numpy(unpack(packed.numpy(), f"uint{bits}", math.prod(shape)))
    return _result(_looked_up(lut.reshape(1, -1, 1), packed, 0).reshape(shape))


def _palette(node: Node, indices: str) -> tuple[torch.Tensor, int]:
    """The tables, which must have an entry for each number that the indices can be, and the vectors' axis."""
    lut, dtype = _tensor(node, "lut"), node.type_of(indices).dtype
    if lut.ndim < 3 or lut.shape[-2] != 2 ** SUB_BYTE.get(dtype, 8):
        raise Unsupported(f"tables {list(lut.shape)} for indices of type {dtype}")
    axis = node.const("vector_axis", None)
    if axis is None and lut.shape[-1] != 1:
        raise Unsupported("vectors without vector_axis")
    return lut, (axis or 0) % (lut.ndim - 2)


@mil_op("constexpr_lut_to_dense", since="CoreML8")
def constexpr_lut_to_dense_18(node: Node) -> Kernel:
    """lut (*groups, entries, vector)[indices], a table for each group."""
    lut, axis = _palette(node, "indices")
    return _result(_looked_up(lut, _tensor(node, "indices"), axis))


@mil_op("constexpr_lut_to_sparse", since="CoreML8")
def constexpr_lut_to_sparse(node: Node) -> Kernel:
    """The mask, as long as the vectors make it, and the values looked up where it is set."""
    lut, axis = _palette(node, "indices_nonzero_data")
    mask = _tensor(node, "indices_mask")
    dense = _looked_up(lut, _dense(_tensor(node, "indices_nonzero_data"), mask), axis)
    mask_of_values = mask.repeat_interleave(lut.shape[-1], axis) if lut.shape[-1] > 1 else mask
    return _result(mask_of_values, dense[mask_of_values.bool()])
