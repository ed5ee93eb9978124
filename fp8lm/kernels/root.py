"""Square roots with the same bits on every processor.

PyTorch's `sqrt` on a CPU is off by a unit in the last place now and then, and so is its `rsqrt` on
a GPU: each has the other right.
"""

from __future__ import annotations

from torch import Tensor


def inverse_root(x: Tensor) -> Tensor:
    """`1 / sqrt(x)` of fp32 `x`, root and quotient rounded correctly; Inf of 0."""
    return x.rsqrt() if x.device.type == "cpu" else x.sqrt().reciprocal_()


def root(x: Tensor) -> Tensor:
    """The inverse of `inverse_root`: within a unit in the last place of the root; 0 of 0."""
    return inverse_root(x).reciprocal_()
