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

Nothing here waits for the device. x may be of any size: it is read in blocks, and what is held in
fp32 is one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
BLOCK_ELEMENTS = 1 << 22
_ROUNDED = 1.0 + 2.0**-20


def measure(
    x: Tensor, quantized: ScaledTensor, kernels: Kernels, *, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`SUMS` (float64) and `MAXIMA` (fp32) of casting `x` (bf16 or fp32) to `quantized`.

    `before` (fp32, shape of `x`) is what was stored until now, for `lost`.
    """
    measured = [_measure_block(*block, kernels) for block in _blocks(x.detach(), quantized, before)]
    sums, maxima = zip(*measured, strict=True)
    return torch.stack(sums).sum(dim=0), torch.stack(maxima).amax(dim=0)


def _blocks(
    x: Tensor, quantized: ScaledTensor, before: Tensor | None
) -> Iterator[tuple[Tensor, ScaledTensor, Tensor | None]]:
    if not quantized.granularity.is_per_tensor:  # of any shape of blocks: the whole at once
        yield x, quantized, before
        return
    x = x.reshape(-1)
    for start in range(0, x.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        old = None if before is None else before.reshape(-1)[block]
        yield x[block], quantized.elements(block.start, block.stop), old


def _measure_block(
    x: Tensor, quantized: ScaledTensor, before: Tensor | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    stored, fmt = kernels.dequantize(quantized), quantized.format
    x = x.float()
    amax = kernels.amax(x)
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
