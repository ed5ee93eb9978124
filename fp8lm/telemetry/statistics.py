"""What a cast does to a tensor, as sums that add up over blocks, micro-batches and ranks.

With x the tensor and q what is stored of it:

    underflow     share of elements that are not zero in x and are in q
    saturation    share of elements beyond the largest value that q's format holds with its scale
    sparsity      share of zeros in x
    snr           10 log10(sum x^2 / sum (q - x)^2), in dB; 0 if q is no number where x is one
    kurtosis      mean x^4 / (mean x^2)^2: 3 for a normal distribution, more with outliers
    lost          share of changed elements (x differs from the stored value before) that q leaves
                  as they were; of a master weight and of a sum of gradients
    amax, scale   the largest |x|, and the smallest scale that any block of it was cast with

Of a tensor with more than `SAMPLE_ELEMENTS` a regular sample of that size is measured, in which all
rows and columns are; amax is that of the whole. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import E4M3, largest_value, scale_from_amax
from fp8lm.scaled_tensor import ScaledTensor

STATISTICS = (
    "amax",
    "scale",
    "underflow",
    "saturation",
    "snr",
    "kurtosis",
    "sparsity",
    "lost",
)
# Columns of what is added up, and of what is maximised.
SUMS = (
    "count",
    "zeros",
    "underflows",
    "saturated",
    "squares",
    "fourths",
    "errors",
    "changed",
    "lost",
)
MAXIMA = ("amax", "inverse_scale")
SAMPLE_ELEMENTS = 1 << 20
_ROUNDED = 1.0 + 2.0**-20


def measure(x: Tensor, quantized: ScaledTensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """`SUMS` (float64) and `MAXIMA` (fp32) of casting `x` (bf16 or fp32) to `quantized`."""
    x = x.detach()
    quantized, part = sample(quantized, x)
    return measure_all(part, quantized, kernels, amax=kernels.amax(x))


def sample(quantized: ScaledTensor, x: Tensor) -> tuple[ScaledTensor, Tensor]:
    """Corresponding elements of both as views, at most about `SAMPLE_ELEMENTS`.

    Whole where scales are of blocks that are not within a row or a column.
    """
    granularity, payload, scale = quantized.granularity, quantized.payload, quantized.scale
    if granularity.is_per_tensor:
        step = _step(payload.numel(), payload.shape[-1] if payload.ndim else 1)
        payload, x = payload.reshape(-1)[::step], x.reshape(-1)[::step]
        return ScaledTensor(payload, scale, quantized.format), x
    if 1 not in (granularity.rows, granularity.columns):
        return quantized, x
    step = _step(payload.numel(), 1)
    taken = slice(None, None, step)
    at: tuple[slice, ...] = (taken,) if granularity.rows == 1 else (slice(None), taken)
    return ScaledTensor(payload[at], scale[at], quantized.format, granularity), x[at]


def _step(numel: int, columns: int) -> int:
    """The distance of sampled elements, which meets every one of the columns in turn."""
    step = max(1, -(-numel // SAMPLE_ELEMENTS))
    while math.gcd(step, columns) > 1:
        step += 1
    return step


def measure_all(
    x: Tensor,
    quantized: ScaledTensor,
    kernels: Kernels,
    *,
    before: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `measure`, of every element.

    `before` (fp32, shape of `x`) is what was stored until now, for `lost`; `amax` is that of a
    tensor of which `x` is a part.
    """
    stored, fmt = kernels.dequantize(quantized), quantized.format
    x = x.float()
    amax = kernels.amax(x) if amax is None else amax
    limit = quantized.granularity.expand(largest_value(quantized.scale, fmt), x.shape)
    limit = limit * _ROUNDED  # an amax times the quotient that is its scale
    zero = x == 0
    # In units of about amax / 448: fourth powers of gradients are beyond fp32.
    unit = scale_from_amax(amax, E4M3)
    y = (x * unit).reshape(-1)
    square = y * y
    error = ((stored - x) * unit).reshape(-1)
    count = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
    counts = [zero.sum(), ((stored == 0) & ~zero).sum(), (x.abs() > limit).sum()]
    powers = [square.sum(), torch.dot(square, square), torch.dot(error, error)]
    scales = torch.stack([unit.double() ** -power for power in (2, 4, 2)])
    changes = [torch.zeros_like(count), torch.zeros_like(count)]
    if before is not None:
        changed = x != before
        changes = [changed.sum(), (changed & (stored == before)).sum()]
    sums = torch.cat(
        (
            torch.stack([count, *(number.double() for number in counts)]),
            torch.stack(powers).double() * scales,
            torch.stack([number.double() for number in changes]),
        )
    )
    return sums, torch.stack((amax, quantized.scale.reciprocal().amax()))


def statistics_of(sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
    """The finite `STATISTICS` of one tensor, from its `SUMS` and `MAXIMA`; none if not observed."""
    total = dict(zip(SUMS, sums, strict=True))
    largest = dict(zip(MAXIMA, maxima, strict=True))
    count, squares = total["count"], total["squares"]
    if not count:
        return {}
    values = {
        "amax": largest["amax"],
        "scale": _ratio(1.0, largest["inverse_scale"]),
        "underflow": total["underflows"] / count,
        "saturation": total["saturated"] / count,
        "sparsity": total["zeros"] / count,
        "snr": _signal_to_noise(squares, total["errors"]),
        "kurtosis": _ratio(count * total["fourths"], squares**2),
        "lost": _ratio(total["lost"], total["changed"]),
    }
    return {name: values[name] for name in STATISTICS if math.isfinite(values[name])}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _signal_to_noise(signal: float, noise: float) -> float:
    """In dB; 0 where a cast made no number of one, NaN where there is no signal or no noise."""
    if not math.isfinite(signal) or signal == 0.0 or noise == 0.0:
        return math.nan
    return 10.0 * math.log10(signal / noise) if math.isfinite(noise) else 0.0
