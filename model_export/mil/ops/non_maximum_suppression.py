"""Non-maximum suppression. Semantics: coremltools defs `tensor_operation.py`; what that leaves open, its tests say."""

import torch

from ..registry import Kernel, Node, mil_op


def _overlaps(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Intersection over union of one box and each of several, (x, y, width, height) with the centre first."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    shared = torch.minimum(high, box[:2] + box[2:] / 2) - torch.maximum(low, box[:2] - box[2:] / 2)
    intersection = shared.clamp_(min=0).prod(1)
    union = boxes[:, 2:].prod(1) + box[2:].prod() - intersection
    return torch.where(union > 0, intersection / union, 0)


def _selected(
    boxes: torch.Tensor, scores: torch.Tensor, most: int, threshold: float, lowest: float | None, per_class: bool
) -> list[int]:
    """The boxes (count, 4) that stay, best first, by the best of their scores (count, classes).

    Where every score is below `lowest`, the best box stays alone, as Core ML has it.
    """
    best, classes = scores.max(1)
    order = torch.argsort(best, descending=True, stable=True)
    if lowest is not None:
        order = order[best[order] >= lowest] if bool((best >= lowest).any()) else order[:1]
    selected: list[int] = []
    while order.numel() and len(selected) < most:
        first, order = int(order[0]), order[1:]
        selected.append(first)
        keeps = _overlaps(boxes[first], boxes[order]) <= threshold
        if per_class:
            keeps |= classes[order] != classes[first]
        order = order[keeps]
    return selected


def _suppression(node: Node, boxes_last: bool) -> Kernel:
    most, threshold = node.const("max_boxes"), node.const("iou_threshold")
    lowest = None if boxes_last else node.const("score_threshold")
    per_class = node.const("per_class_suppression", False)
    for output, key in enumerate(("boxes", "scores")):
        batch, *inner = node.type_of(key).shape
        inner[1 if boxes_last else 0] = most
        node.expects(batch, *inner, output=output)

    def run(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if boxes_last:
            boxes, scores = boxes.mT, scores.mT
        kept_boxes = boxes.new_zeros(boxes.shape[0], most, 4)
        kept_scores = scores.new_zeros(scores.shape[0], most, scores.shape[2])
        indices = torch.full(kept_boxes.shape[:2], -1, dtype=torch.int32)
        counts = torch.zeros(boxes.shape[0], dtype=torch.int32)
        for item in range(boxes.shape[0]):
            kept = _selected(boxes[item].float(), scores[item], most, threshold, lowest, per_class)
            counts[item] = len(kept)
            kept_boxes[item, : len(kept)] = boxes[item, kept]
            kept_scores[item, : len(kept)] = scores[item, kept]
            indices[item, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        if boxes_last:
            return kept_boxes.mT, kept_scores.mT, indices
        return kept_boxes, kept_scores, indices, counts

    return node.kernel(run, "boxes", "scores", exact=True)


@mil_op("non_maximum_suppression")
def non_maximum_suppression_15(node: Node) -> Kernel:
    """Boxes and scores that no better box overlaps too much; zeros and indices of -1 fill up to max_boxes."""
    return _suppression(node, boxes_last=False)


@mil_op("non_maximum_suppression", since="CoreML7")
def non_maximum_suppression_17(node: Node) -> Kernel:
    """Without a threshold of scores and the number of boxes; a box is a column, not a row."""
    return _suppression(node, boxes_last=True)
