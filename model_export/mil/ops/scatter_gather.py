"""Gathering. Semantics: coremltools defs `scatter_gather.py`."""

import torch

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op


def _wrapped(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices with negative ones counted from the end (allowed before iOS 17, out of range since)."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@mil_op("gather")
def gather(node: Node) -> Kernel:
    """Slices of x along one axis; the indices' dimensions replace it."""
    axis = node.const("axis", 0) % node.rank("x")
    if node.const("batch_dims", 0) != 0:
        raise Unsupported("batch_dims")
    node.const("validate_indices", False)  # an index out of range is always refused
    sizes, (indices,) = node.type_of("x").shape, node.shapes("indices")
    node.expects(*sizes[:axis], *indices, *sizes[axis + 1 :])

    def run(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        taken = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
        return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    return node.kernel(run, "x", "indices", exact=True)


@mil_op("gather_along_axis")
def gather_along_axis(node: Node) -> Kernel:
    axis = node.const("axis", 0)
    node.const("validate_indices", False)
    sizes, indices = list(node.type_of("x").shape), list(node.type_of("indices").shape)
    sizes[axis] = 1
    whole = broadcast(sizes, indices)
    whole[axis] = indices[axis]
    node.expects(*whole)

    def run(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return torch.take_along_dim(x, _wrapped(indices, x.shape[axis]), axis)

    return node.kernel(run, "x", "indices", exact=True)
