"""Static scaling: scales that are fixed by construction, and not by what is in a tensor.

    input            1                          norms give a root mean square of 1, activations less
    weight           2^floor(log2 sqrt(I))      so that weights of variance 1/I have one of 1
    output gradient  2^floor(log2 tokens)       so that that of a token's own loss is cast

for I input features and the tokens of a step on a rank. After Unit Scaling (Blake et al., arXiv
2303.11257) and Graphcore's FP8 (Perez et al., arXiv 2309.17224): with values of about 1, which lies
in the middle of both formats' ranges, no scale needs to be found. Different from it: the
operations of the model are not rescaled, so that how near to 1 they are depends on the initial
weights, and the factors are in the casts alone. What exceeds a format saturates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class UnitScale:
    """A scale of `value` times `unit`, both powers of two; see `KnownScale`."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.unit: Tensor | float = 1.0

    @classmethod
    def of_weight(cls, in_features: int) -> UnitScale:
        """That of a weight [O, in_features]."""
        return cls(2.0 ** math.floor(math.log2(in_features) / 2))

    def __call__(self, amax: Tensor) -> Tensor:
        """See `KnownScale`."""
        return torch.where(amax.isfinite(), self.value * self.unit, math.nan)
