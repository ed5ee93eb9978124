"""A loss per token with its standard error, from parts of a corpus.

    loss = sum_i x_i / sum_i n_i            part i: x_i nats of n_i tokens
    variance of the loss = D / (D - 1) sum_i (x_i - n_i loss)^2 / (sum_i n_i)^2       D parts

which is the usual linearization of a ratio. Of two models on the same parts the difference has far
less variance than either loss: x_i is then the difference of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A value and its standard error, NaN for a single part."""

    value: float
    error: float


def per_token(nats: Sequence[float], tokens: Sequence[int]) -> Mean:
    """The loss per token of parts of `nats` and `tokens`; `nats` may be differences."""
    count, total = len(nats), sum(tokens)
    value = sum(nats) / total
    squares = sum((x - n * value) ** 2 for x, n in zip(nats, tokens, strict=True))
    if count < 2:
        return Mean(value, math.nan)
    return Mean(value, math.sqrt(count / (count - 1) * squares) / total)
