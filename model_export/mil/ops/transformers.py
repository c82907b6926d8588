"""Attention as one operation, since iOS 18. Semantics: coremltools defs `iOS18/transformers.py`."""

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op
from . import _strict


@mil_op("scaled_dot_product_attention", since="CoreML8")
def scaled_dot_product_attention(node: Node) -> Kernel:
    """softmax(query key^T / sqrt(E) + mask) value; computed in float32 and rounded once after, but for strict-fp16."""

    query, key, value = node.shapes("query", "key", "value")
    leading = [query[:-2], key[:-2], value[:-2]]
    if any(broadcast(shape, query[:-2]) != list(query[:-2]) for shape in leading):
        raise Unsupported(f"query, key and value of shapes {query}, {key}, {value}")
    node.expects(*query[:-1], value[-1])

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)

    if node.decomposes:
        return node.kernel(_strict.attention, "query", "key", "value", "attn_mask", exact=True)
    return node.kernel(run, "query", "key", "value", "attn_mask")
