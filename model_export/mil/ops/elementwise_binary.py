"""Operations on two broadcast tensors. Semantics: coremltools defs `elementwise_binary.py`."""

from collections.abc import Callable
from typing import Any

import torch

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op

# type: (function, the same over its first operand or None, whether fp16 operands give fp16 results exactly)
_BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, bool]] = {
    "add": (torch.add, torch.Tensor.add_, False),
    "sub": (torch.sub, torch.Tensor.sub_, False),
    "mul": (torch.mul, torch.Tensor.mul_, False),
    "real_div": (torch.div, torch.Tensor.div_, False),
    "floor_div": (torch.floor_divide, None, False),
    "mod": (torch.remainder, None, False),
    "pow": (torch.pow, None, False),
    "maximum": (torch.maximum, None, True),
    "minimum": (torch.minimum, None, True),
    "equal": (torch.eq, None, True),
    "not_equal": (torch.ne, None, True),
    "greater": (torch.gt, None, True),
    "greater_equal": (torch.ge, None, True),
    "less": (torch.lt, None, True),
    "less_equal": (torch.le, None, True),
    "logical_and": (torch.logical_and, None, True),
    "logical_or": (torch.logical_or, None, True),
    "logical_xor": (torch.logical_xor, None, True),
}


def _safely(x: torch.Tensor, y: torch.Tensor, function: Callable[..., Any]) -> torch.Tensor:
    """Integers divided: 0 where y is, as NumPy has it; in 64 bits, where the least number divided by -1 fits."""
    divisor = torch.where(y == 0, 1, y).to(torch.int64)
    return torch.where(y == 0, 0, function(x.to(torch.int64), divisor)).to(torch.int32)


# What a division is where its operands are integers.
_INTEGERS: dict[str, Callable[..., Any]] = {
    "real_div": lambda x, y: _safely(x, y, lambda x, y: torch.div(x, y, rounding_mode="trunc")),
    "floor_div": lambda x, y: _safely(x, y, torch.floor_divide),
    "mod": lambda x, y: _safely(x, y, torch.remainder),
}


@mil_op(*_BINARY)
def binary(node: Node) -> Kernel:
    function, inplace, exact = _BINARY[node.operation.type]
    if not node.has("y"):
        raise Unsupported("y is missing")
    if node.type.dtype == "int32" and node.operation.type in _INTEGERS:
        function, inplace = _INTEGERS[node.operation.type], None
    node.expects(*broadcast(*node.shapes("x", "y")))
    kernel = node.kernel(function, "x", "y", exact=exact, inplace=inplace)
    # x is the one to write over; a sum or product may swap its operands to make that possible.
    commutes = node.operation.type in ("add", "mul") and not isinstance(kernel.args[0], str)
    return Kernel(function, kernel.args[::-1], exact, inplace=inplace) if commutes else kernel
