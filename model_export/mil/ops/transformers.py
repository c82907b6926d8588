"""Attention as one operation, since iOS 18. Semantics: coremltools defs `iOS18/transformers.py`."""

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op
from . import _strict
from ._mixed import unmixed


@mil_op("scaled_dot_product_attention", since="CoreML8")
def scaled_dot_product_attention(node: Node) -> Kernel:
    """softmax(query key^T / sqrt(E) + mask) value; computed in float32 and rounded once after, but for strict-fp16.

    A row that is masked altogether is NaN, by the formula; PyTorch's own function makes it 0.
    """
    query, key, value = node.shapes("query", "key", "value")
    masks = [mask[:-1] for mask in node.shapes("attn_mask")]
    for shape, whole in ((key[:-2], query[:-2]), (value[:-2], query[:-2]), *((mask, query[:-1]) for mask in masks)):
        together = broadcast(shape, whole)
        if len(together) > len(whole) or any(None not in pair and pair[0] != pair[1] for pair in zip(together, whole)):
            raise Unsupported(
                f"query, key and value of shapes {query}, {key}, {value}, masks before the last of {masks}"
            )
    node.expects(*query[:-1], value[-1])

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(query, key, value)
        mask = mask if mask.ndim > 1 else mask.unsqueeze(0)
        result = F.scaled_dot_product_attention(query, key, value, mask)
        masked = (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)
        return torch.where(masked, torch.nan, result) if masked.any() else result

    if node.decomposes:
        return node.kernel(_strict.attention, "query", "key", "value", "attn_mask", exact=True)
    keys = ("query", "key", "value", "attn_mask")
    boolean = node.has("attn_mask") and node.type_of("attn_mask").dtype == "bool"
    return node.kernel(run if boolean else unmixed(node, run, *keys), *keys)
