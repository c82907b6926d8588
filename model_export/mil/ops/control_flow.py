"""Choices, branches and loops. Semantics: coremltools defs `control_flow.py`.

The executor runs the blocks of a branch or a loop (`executor.py`) and belongs to const; here they are only checked.
"""

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


def _shapes_of_blocks(node: Node, *shapes: tuple[int, int]) -> None:
    """Unsupported unless the operation has blocks with so many (inputs, outputs)."""
    found = [(len(block.inputs), len(block.outputs)) for block in node.operation.blocks]
    if found != list(shapes):
        raise Unsupported(f"blocks with (inputs, outputs) {found}, expected {list(shapes)}")


@mil_op("cond")
def cond(node: Node) -> Kernel:
    """The outputs of the first block where pred holds, else of the second."""
    count = len(node.operation.outputs)
    _shapes_of_blocks(node, (0, count), (0, count))
    if node.type_of("pred").dtype != "bool":
        raise Unsupported(f"pred is {node.type_of('pred')}, expected a bool")
    return node.kernel(lambda pred: pred, "pred", exact=True, keeps=True)


@mil_op("while_loop")
def while_loop(node: Node) -> Kernel:
    """loop_vars = second block(loop_vars) while first block(loop_vars) holds."""
    variables = node.operands("loop_vars")
    count = len(variables)
    _shapes_of_blocks(node, (count, 1), (count, count))
    if len(node.operation.outputs) != count:
        raise Unsupported(f"{len(node.operation.outputs)} results of {count} loop_vars")
    return Kernel(lambda *variables: variables, variables, exact=True, keeps=True)
