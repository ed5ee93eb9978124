"""What many additions in an FP8 format lose.

Every addition rounds the whole sum, so the error grows with their number; and where the terms are
small beside the sum, rounding to nearest drops them altogether.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from fp8lm.numerics.formats import E2M5, E4M3, Format

ENOUGH = 25.0  # dB: the error is then 6 % of the gradient

# Signal to noise in dB by number of terms: the lower of what tools/measure_accumulation.py finds
# before the first step and after 120 (docs/concepts/numerics.md has both).
_MEASURED: Mapping[Format, Mapping[int, float]] = MappingProxyType(
    {
        E4M3: MappingProxyType({1: 31.4, 8: 25.4, 16: 23.2, 32: 18.3, 64: 8.9, 128: 4.5}),
        E2M5: MappingProxyType({1: 43.4, 8: 37.5, 16: 35.4, 32: 32.5, 64: 29.8, 128: 26.8}),
    }
)


def expected_snr(fmt: Format, count: int) -> float:
    """Signal to noise in dB of a sum of `count` gradients in `fmt`; infinite for wider formats.

    On the line between two measured counts, over the logarithm of `count`; beyond the last on that
    of the last two.
    """
    measured = _MEASURED.get(fmt)
    if measured is None:
        return math.inf
    counts = sorted(measured)
    at = next((i for i in range(1, len(counts)) if count <= counts[i]), len(counts) - 1)
    low, high = counts[at - 1], counts[at]
    share = math.log2(count / low) / math.log2(high / low)
    return measured[low] + share * (measured[high] - measured[low])


def accumulation_risk(fmt: Format, count: int) -> str | None:
    """What is to be expected of `count` micro-batches a step, where that is too little."""
    snr = expected_snr(fmt, count)
    if snr >= ENOUGH:
        return None
    wider = "fp8_e2m5 with precision.grad_reduce=fp32_accumulate" if fmt == E4M3 else "bf16"
    lost = f"about {snr:.0f} dB are left of them" if snr > 0 else "nothing is left of them"
    return (
        f"gradients of {count} micro-batches a step are added up in {fmt}: {lost}; "
        f"use precision.main_grads_dtype={wider}"
    )
