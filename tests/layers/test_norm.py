"""Norms against their formulas in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.norm import NORMS
from fp8lm.numerics import BF16, FP32

KERNELS = ReferenceKernels()
SIZE, EPS = 48, 1e-3


def formula(kind, x, weight, bias):
    if kind == "LayerNorm":
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight + bias
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_formula(kind, fmt):
    generator = torch.Generator().manual_seed(0)
    norm = NORMS[kind](SIZE, EPS, fmt, KERNELS, torch.device("cpu"))
    vectors = [norm.weight, norm.bias] if kind == "LayerNorm" else [norm.weight]
    for vector in vectors:
        vector.model_param.payload.copy_(torch.randn(SIZE, generator=generator))
    x = (torch.randn(3, 5, SIZE, generator=generator) * 0.1 + 0.05).to(fmt.dtype).requires_grad_()
    dy = torch.randn(3, 5, SIZE, generator=generator).to(fmt.dtype)
    y = norm(x)
    y.backward(dy)

    doubles = [t.detach().double().requires_grad_() for t in (x, *(v.param for v in vectors))]
    expected = formula(kind, *doubles, *([None] if len(vectors) == 1 else []))
    expected.backward(dy.double())
    # RMSNorm in bf16 rounds x / rms before it multiplies by the weight, and so on back: 3 units.
    unit = torch.finfo(fmt.dtype).eps
    results = [y, x.grad, *(vector.main_grad.value.payload for vector in vectors)]
    references = [expected, *(t.grad for t in doubles)]
    for result, reference in zip(results, references, strict=True):
        atol = 3 * unit * reference.abs().max().item()
        torch.testing.assert_close(result.double(), reference, rtol=3 * unit, atol=atol)
    assert y.dtype == fmt.dtype


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_vectors_do_not_decay_and_have_fp32_gradients(kind):
    norm = NORMS[kind](SIZE, EPS, BF16, KERNELS, torch.device("cpu"))
    for vector in norm.children():
        assert not vector.spec.decay
        assert (vector.spec.format, vector.spec.grad_format) == (BF16, FP32)
