"""Smooth-SwiGLU: a power of two per channel of a layer's input, taken back in its weight.

    y = x W^T = (x s) (W / s)^T        s[I]: brings the amax of every channel of x into one binade

After Fishman et al. (arXiv 2409.12517, section 4.4): late in a training some channels of
`silu(gate) * up` grow far beyond the others, which one scale per tensor cannot hold. A power of two
moves exponents alone, so that x s and W / s are exact, and only their casts to FP8 round. Different
from the paper: s is a power of two; W / s is cast for the forward GEMM alone, in every micro-batch.
dgrad reads W as it is, since no input is in it, and the columns of dW, which wgrad computes of x s,
are divided by s.
"""

from __future__ import annotations

from torch import Tensor

from fp8lm.numerics import E4M3, scale_from_amax

_LARGEST = 2.0**126


def channel_scales(x: Tensor) -> Tensor:
    """The powers of two [I] for x [T,I], in its dtype; NaN for a channel that is not finite.

    They take the amax of a channel to between half of E4M3's largest number and that. A channel of
    zeros gets the largest scale: its weights, which multiply nothing, then take no part in theirs.
    """
    amax = x.abs().amax(dim=0).float()
    return scale_from_amax(amax, E4M3).masked_fill_(amax == 0, _LARGEST).to(x.dtype)
