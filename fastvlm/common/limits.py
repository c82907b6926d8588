"""Limits of a model's values, prompts and answers, and the messages where they are left."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np

from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed


class Part(Protocol):
    """The runner of a part of the model, and what to do when it computes NaN or infinity."""

    name: str
    remedy: str


def finite(values: np.ndarray, what: str, part: Part, first: int = 0) -> np.ndarray:
    """`values`; CheckFailed, naming `what` ("stage: values", where {} is the position, counted from `first`) and the
    remedy, where one isn't finite."""
    if not values.size or (math.isfinite(values.min()) and math.isfinite(values.max())):  # NaN comes out of both
        return values
    bad = ~np.isfinite(values)
    position = first + (np.argwhere(bad)[0][-2] if values.ndim > 1 else 0)
    counted = f"{np.count_nonzero(bad):,} of {values.size:,} values are NaN or infinite"
    raise CheckFailed(f"{what.format(position)}: {counted} ({part.name}): {part.remedy}")


def positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model of this config.json was made for; None where it doesn't say.

    A rotary encoding that is scaled (YaRN, linear) reaches so many times as far as the unscaled one did.
    """
    stated: int | None = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if stated is None or not isinstance(rope.get("factor"), int | float):
        return stated
    return max(stated, int((rope.get("original_max_position_embeddings") or stated) * rope["factor"]))


def stopped(positions: int) -> str:
    """The message about an answer that the positions end, not the model."""
    return f"warning: the answer is cut off: the language model has {positions} positions (max_position_embeddings)"


@cache
def warn_once(line: str) -> None:
    """A warning on stderr, the same one the first time only."""
    log(f"warning: {line}")
