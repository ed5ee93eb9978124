"""Smooth-SwiGLU: exact but for the casts, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.linear import GemmPath, linear
from fp8lm.layers.param import ParamSpec, QuantizedParam
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.recipe import FP8_GEMM
from fp8lm.layers.smoothing import channel_scales
from fp8lm.numerics import BF16, E4M3, FP32

KERNELS = ReferenceKernels()
TOKENS, IN, OUT = 32, 64, 48


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x, w, dy, *, smooth, storage=BF16, kernels=KERNELS):
    """y, dx, dw of one layer."""
    spec = ParamSpec((OUT, IN), None, storage, FP32)
    weight = QuantizedParam(spec, kernels, torch.device("cpu"), Quantizer(E4M3, kernels))
    weight.model_param.copy_(KERNELS.quantize(w, storage))
    weight.main_grad.zero()
    x = x.clone().requires_grad_()
    y = linear(x, weight, GemmPath(FP8_GEMM, kernels, smooth=smooth))
    y.backward(dy)
    return y.detach(), x.grad, weight.main_grad.value.payload


def batch(channels):
    x = (random(TOKENS, IN, seed=1) * channels).bfloat16()
    w = (random(OUT, IN, seed=2) * 0.02).bfloat16()
    return x, w, (random(TOKENS, OUT, seed=3) * 1e-4).bfloat16()


def test_scales_bring_every_channel_into_one_binade():
    x, _, _ = batch(torch.logspace(-6, 3, IN))
    x[:, 5] = 0.0
    scales = channel_scales(x)
    amaxes = (x * scales).abs().amax(dim=0)
    assert scales.dtype == x.dtype and (torch.frexp(scales.float())[0] == 0.5).all()
    others = torch.arange(IN) != 5
    assert (amaxes[others] > 224).all() and (amaxes <= 448).all() and amaxes[5] == 0
    x[3, 7] = math.nan
    assert channel_scales(x).isnan().tolist() == [i == 7 for i in range(IN)]


class ExactCasts(ReferenceKernels):
    """Casts that keep all bits."""

    def quantize(self, x, fmt, *, amax=None, granularity=None):
        return super().quantize(x, FP32)

    def quantize_with_transpose(self, x, fmt, *, amax=None, sums=False):
        quantized = self.quantize(x, fmt)
        return quantized, quantized.t()


def test_only_casts_tell_it_from_the_layer_itself():
    x, w, dy = batch(torch.logspace(-2, 2, IN))
    results = (run(x, w, dy, smooth=smooth, kernels=ExactCasts()) for smooth in (False, True))
    for plain, smooth in zip(*results, strict=True):
        assert torch.equal(plain, smooth)


@pytest.mark.parametrize("storage", [BF16, E4M3], ids=repr)
def test_a_channel_that_has_grown_no_longer_costs_the_others(storage):
    channels = torch.full((IN,), 1e-3)
    channels[7] = 4e3  # beyond what one scale of E4M3 holds beside 1e-3
    x, w, dy = batch(channels)
    w[:, 7] *= 1e-6  # its weights: without them the others' part of y would not show
    exact = x.double() @ w.double().t(), dy.double() @ w.double(), dy.double().t() @ x.double()
    errors = {}
    for smooth in (False, True):
        results = run(x, w, dy, smooth=smooth, storage=storage)
        errors[smooth] = [
            ((r.double() - e).norm(dim=0) / e.norm(dim=0)).median().item()
            for r, e in zip(results, exact, strict=True)
        ]
    # Of y and of dw; dgrad has no input in it.
    assert errors[True][2] < 0.08 < 0.9 < errors[False][2]
    assert errors[True][1] == errors[False][1]
    if storage == BF16:
        assert errors[True][0] < 0.1 < errors[False][0]


def test_a_channel_of_zeros_changes_nothing():
    x, w, dy = batch(torch.ones(IN))
    x[:, 3] = 0.0
    w[:, 3] = 50.0  # it would take the range of the cast weight
    y, _, dw = run(x, w, dy, smooth=True)
    exact = x.double() @ w.double().t()
    assert (y.double() - exact).norm() < 0.05 * exact.norm() and (dw[:, 3] == 0).all()
