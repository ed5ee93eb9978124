"""Square roots whose bits are defined: root and quotient are rounded correctly, each once.

PyTorch's `sqrt` on a CPU is off by a unit in the last place now and then, its `rsqrt` there never.
On a GPU it is `rsqrt` that is an approximation.
"""

from __future__ import annotations

from torch import Tensor


def inverse_root(x: Tensor) -> Tensor:
    """`1 / sqrt(x)` of fp32 `x`, root and quotient rounded correctly; Inf of 0."""
    return x.rsqrt() if x.device.type == "cpu" else x.sqrt().reciprocal_()


def root(x: Tensor) -> Tensor:
    """The inverse of `inverse_root`: three roundings away from the root; 0 of 0."""
    return inverse_root(x).reciprocal_()
