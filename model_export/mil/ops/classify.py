"""A classifier's outputs. Semantics: coremltools defs `classify.py`."""

import torch

from ..registry import Kernel, Node, Unsupported, mil_op


@mil_op("classify")
def classify(node: Node) -> Kernel:
    """The label of the largest probability (the first of several), and {label: probability}."""
    classes = node.raw("classes")
    if classes is None or isinstance(classes, str):
        raise Unsupported("classes are no constant list")
    labels = list(classes) if isinstance(classes, tuple) else classes.tolist()
    known = node.type_of("probabilities").shape
    count = torch.Size([size or 0 for size in known]).numel()
    if not labels or (None not in known and count != len(labels)):
        raise Unsupported(f"{len(labels)} classes for probabilities {node.type_of('probabilities')}")

    def run(probabilities: torch.Tensor) -> tuple[object, dict[object, float]]:
        flat = probabilities.reshape(-1)
        if flat.numel() != len(labels):
            raise ValueError(f"{flat.numel()} probabilities of {len(labels)} classes")
        label = labels[int(flat.argmax())]
        named = dict(zip(labels, map(float, flat.tolist())))
        return (label if isinstance(label, str) else torch.tensor(label)), named

    return node.kernel(run, "probabilities", exact=True)
