"""The one branch-free operation of coremltools defs `control_flow.py` (const belongs to the executor)."""

import torch

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op


@mil_op("select")
def select(node: Node) -> Kernel:
    """a where cond holds, else b; without both, the indices where it holds, one row each."""
    if not node.has("a") and not node.has("b"):
        return node.kernel(lambda cond: cond.nonzero().to(torch.int32), "cond")
    if not node.has("a") or not node.has("b"):
        raise Unsupported("one of a and b is missing")
    node.expects(*broadcast(*node.shapes("cond", "a", "b")))
    return node.kernel(torch.where, "cond", "a", "b", exact=True)
