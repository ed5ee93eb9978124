"""Scales for a step's results before the step is computed: one pass, no overflow, no host sync.

    amax(m') <= b1 amax(m) + (1 - b1) amax(g)
    amax(v') <= b2 amax(v) + (1 - b2) amax(g)^2
    amax(w') <= (1 - lr wd) amax(w) + lr U,      U >= |m'/bc1| / sqrt(v'/bc2)

U is Cauchy-Schwarz on the two exponential sums, with a factor 2 for the rounding of the stored
moments. A v that is stored as its root, rounded stochastically, may lose more, however improbably:
an update is cut off at U then, which no history of gradients reaches. A bound is at most a few
binades above the truth, which costs a floating format nothing but that part of its range; the true
amax, collected in the same pass, starts the next step's bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.kernels.adam import AdamCoefficients
from fp8lm.numerics import Format

_MOMENT_ROUNDING = 2.0
# Of b1^2 / b2. At 1 an update can grow without limit after a spike: beyond this it saturates.
_LARGEST_RATIO = 0.9999


def bound_amax(
    amax: Tensor, grad_amax: Tensor, decay: Tensor, c: AdamCoefficients, formats: tuple[Format, ...]
) -> Tensor:
    """Upper bounds (fp32 [W,3]) for the new master, m and v of W weights.

    `amax` [W,3] are the old true ones, `grad_amax` [W] those of the unclipped gradients, `decay`
    [W] the weight decays; `formats` are those of the three states, whose stored values can exceed
    the collected amax by a unit in the last place.
    """
    w, m, v = (
        column * _rounded_up(fmt) for column, fmt in zip(amax.unbind(dim=1), formats, strict=True)
    )
    g = grad_amax * c.clip_factor
    bounds = (
        w * (1.0 - c.lr * decay) + c.lr * update_bound(c),
        c.beta1 * m + (1.0 - c.beta1) * g,
        c.beta2 * v + (1.0 - c.beta2) * g * g,
    )
    return torch.stack(bounds, dim=1) * (1.0 + 2.0**-20)  # the fp32 roundings of the step itself


def _rounded_up(fmt: Format) -> float:
    """The most that a value of `fmt` grows by its rounding."""
    factor = 1.0 + 2.0**-fmt.mantissa_bits
    return factor**2 if fmt.root else factor


def update_bound(c: AdamCoefficients) -> Tensor:
    """U (0-d fp32): the largest Adam update any gradient history can give.

    |m| <= (1-b1) sum b1^i |g_i| and v = (1-b2) sum b2^i g_i^2, so by Cauchy-Schwarz
    |m| / sqrt(v) <= (1-b1) / sqrt(1-b2) * sqrt(sum (b1^2/b2)^i) <= ... / sqrt(1 - b1^2/b2).
    """
    ratio = min(c.beta1**2 / max(c.beta2, 1e-30), _LARGEST_RATIO)
    exact = (1.0 - c.beta1) / (1.0 - c.beta2) ** 0.5 / (1.0 - ratio) ** 0.5
    return _MOMENT_ROUNDING * exact * c.bias_correction2.sqrt() / c.bias_correction1
