"""The one branch-free operation of coremltools defs `control_flow.py` (const belongs to the executor)."""

import torch

from ..registry import Kernel, Node, broadcast, mil_op


@mil_op("select")
def select(node: Node) -> Kernel:
    """a where cond holds, else b."""
    node.expects(*broadcast(*node.shapes("cond", "a", "b")))
    return node.kernel(torch.where, "cond", "a", "b", exact=True)
