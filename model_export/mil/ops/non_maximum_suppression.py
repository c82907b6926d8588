"""Boxes that don't overlap. Semantics: coremltools defs `tensor_operation.py`."""

import torch

from ..registry import Kernel, Node, Unsupported, mil_op


def _overlaps(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of (4) and (N, 4), each (column and row of the centre, width, height); 0 of no area."""
    low, high = ((sign * 0.5) * others[:, 2:] + others[:, :2] for sign in (-1, 1))
    inside = torch.minimum(high, box[:2] + 0.5 * box[2:]) - torch.maximum(low, box[:2] - 0.5 * box[2:])
    shared = inside.clamp(min=0).prod(-1)
    union = others[:, 2:].prod(-1) + box[2:].prod() - shared
    return torch.where(union > 0, shared / union, 0.0)


def _kept(
    boxes: torch.Tensor, scores: torch.Tensor, overlap: float, least: float, most: int, apart: bool
) -> torch.Tensor:
    """Indices of the boxes (B, 4) that stay, the highest score (B, K) first; with `apart` a box only displaces those
    whose highest score is for the same class."""
    if not boxes.shape[0] or not scores.shape[1]:
        return torch.zeros(0, dtype=torch.int64)
    best, kind = scores.max(-1)
    order = torch.argsort(best, descending=True, stable=True)
    waiting = order[best[order] >= least]
    kept: list[torch.Tensor] = []
    while len(waiting) and len(kept) < most:
        first, waiting = waiting[0], waiting[1:]
        kept.append(first)
        away = _overlaps(boxes[first], boxes[waiting]) > overlap
        if apart:
            away &= kind[waiting] == kind[first]
        waiting = waiting[~away]
    # Where no score is high enough the highest one stays, as in coremltools' own reference of what devices give.
    return torch.stack(kept) if kept else order[:most][:1]


def _suppression(node: Node, last: bool) -> Kernel:
    """`last`: the boxes are the last dimension of boxes, scores and results."""
    overlap, most = node.const("iou_threshold"), node.const("max_boxes")
    least = -torch.inf if last else node.const("score_threshold")
    apart = node.const("per_class_suppression", False)
    shape = node.type_of("scores").shape
    batch, classes = shape[0], shape[1 if last else 2]
    sizes = [[batch, 4, most], [batch, classes, most]] if last else [[batch, most, 4], [batch, most, classes]]
    node.expects(*sizes[0])
    second = node.operation.outputs[1].type
    if second is None or any(None not in (a, b) and a != b for a, b in zip(second.shape, sizes[1], strict=True)):
        raise Unsupported(f"scores of {sizes[1]}, declared {second}")

    def run(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if last:
            boxes, scores = boxes.mT, scores.mT
        chosen = boxes.new_zeros(len(boxes), most, 4)
        theirs = scores.new_zeros(len(boxes), most, scores.shape[2])
        indices = torch.full((len(boxes), most), -1, dtype=torch.int32)
        counts = torch.zeros(len(boxes), dtype=torch.int32)
        for i in range(len(boxes)):
            kept = _kept(boxes[i].to(torch.float32), scores[i], overlap, least, most, apart)
            counts[i] = count = len(kept)
            chosen[i, :count], theirs[i, :count], indices[i, :count] = boxes[i, kept], scores[i, kept], kept.int()
        return (chosen.mT, theirs.mT, indices) if last else (chosen, theirs, indices, counts)

    return node.kernel(run, "boxes", "scores", exact=True)


@mil_op("non_maximum_suppression")
def non_maximum_suppression(node: Node) -> Kernel:
    """boxes (n, B, 4), scores (n, B, K): the boxes kept (n, max_boxes, 4), their scores, indices (-1 where there are
    fewer) and number."""
    return _suppression(node, last=False)


@mil_op("non_maximum_suppression", since="CoreML7")
def non_maximum_suppression_ios17(node: Node) -> Kernel:
    """boxes (n, 4, B), scores (n, K, B), no score is too low, and the number is not returned."""
    return _suppression(node, last=True)
