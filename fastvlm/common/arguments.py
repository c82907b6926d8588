"""The argparse types of values that several verbs take; `cli.Parser` reports all refused values at once."""

import argparse
import math
from collections.abc import Callable


def whole_number(least: int = 1, multiple: int = 1) -> Callable[[str], int]:
    """The type of a whole number from `least` on that is a multiple of `multiple`."""

    def convert(text: str) -> int:
        expected = f"a whole number from {least}" + (f", a multiple of {multiple}" if multiple > 1 else "")
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or value % multiple:
            raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
        return value

    return convert


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value
