"""Schemes on PyTorch's tensors, for what calibrates, measures and computes: the arrays are the tensors' memory."""

from collections.abc import Mapping

from torch import Tensor

from fastvlm.common.dtypes import as_array, as_tensor
from quantization.schemes import Scheme


def encode(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    """The parts that a scheme stores of a weight."""
    return {part: as_tensor(array) for part, array in scheme.encode(as_array(weight))[0].items()}


def decode(scheme: Scheme, parts: Mapping[str, Tensor]) -> Tensor:
    """The values, in the scheme's dtype, that MLX computes with."""
    return as_tensor(scheme.decode({part: as_array(tensor) for part, tensor in parts.items()}))


def as_stored(scheme: Scheme, weight: Tensor) -> Tensor:
    """A weight after a round trip through a scheme, in its own dtype."""
    stored = scheme.decode(scheme.encode(as_array(weight))[0])
    return as_tensor(stored).to(weight.dtype)
