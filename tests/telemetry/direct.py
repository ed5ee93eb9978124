"""Statistics by their definitions, from whole tensors in double precision."""

from __future__ import annotations

import math

import torch

from fp8lm.kernels import ReferenceKernels

KERNELS = ReferenceKernels()


def direct(casts):
    """Of pairs (tensor, what is stored of it as a ScaledTensor), taken as one tensor."""
    x = torch.cat([x.double().flatten() for x, _ in casts])
    q = torch.cat([KERNELS.dequantize(q).double().flatten() for _, q in casts])
    scales = torch.cat([q.scale.flatten() for _, q in casts])
    limits = torch.cat([limit(q).expand(q.shape).flatten() for _, q in casts])
    nonzero, error = x != 0, (q - x).square().sum()
    squares = x.square()
    values = {
        "amax": x.abs().max(),
        "scale": scales.min(),
        "underflow": (nonzero & (q == 0)).double().mean(),
        "saturation": (x.abs() > limits).double().mean(),
        "sparsity": (~nonzero).double().mean(),
        "kurtosis": squares.square().mean() / squares.mean().square(),
        "snr": 10 * torch.log10(squares.sum() / error),
    }
    values = {name: float(value) for name, value in values.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def limit(q):
    largest = q.format.max / q.granularity.expand(q.scale, q.shape).double()
    largest = largest.square() if q.format.root else largest
    return largest * (1 + 1e-6)  # a scale is rounded to fp32


def differences(found, expected, relative=1e-4):
    """Statistics of `expected` that `found` lacks or has otherwise."""
    return {
        name: (found.get(name), value)
        for name, value in expected.items()
        if not math.isclose(found.get(name, math.nan), value, rel_tol=relative, abs_tol=1e-12)
    }
