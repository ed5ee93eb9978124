"""What argparse takes as types: numbers within bounds, told in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number_type(least: int, most: int | None = None, why: str = "") -> Callable[[str], int]:
    """Whole numbers from `least`, 0 or more, to `most`; `why` there are no more."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most}{why and f': {why}'}")
        return int(text)

    return number


def finite(text: str) -> float:
    """A number of 0 or more, neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value
