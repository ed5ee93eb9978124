"""The second moment as its root in E4M4: right on average over many steps, and never divided by."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels.rounding import cast_stochastic, noise_bits
from fp8lm.numerics import E4M3, FP32, ROOT_E4M4, largest_value, scale_from_amax
from fp8lm.optim.bounds import update_bound
from fp8lm.scaled_tensor import ScaledTensor
from tests.optim.bench import KERNELS, LR, matrix, optimizer, set_gradients, state_precision
from tests.optim.test_single_pass import coefficients

ROOT = state_precision("fp32", "fp32", "fp8_e4m4_root")
ONE = torch.ones(())


def test_codes_are_roots():
    codes, scale = torch.arange(256, dtype=torch.int16).to(torch.uint8), torch.tensor(2.0**5)
    values = KERNELS.dequantize(ScaledTensor(codes, scale, ROOT_E4M4))
    roots = [c * 2.0**-10 if c < 16 else (16 + c % 16) * 2.0 ** (c // 16 - 11) for c in range(256)]
    assert torch.equal(values, (torch.tensor(roots) / scale).square())
    # The number 0 is what a new state holds; a cast gives the smallest instead.
    assert torch.equal(KERNELS.cast(values, scale, ROOT_E4M4), codes.clamp(min=1))
    largest = values[-1]
    assert scale_from_amax(largest, ROOT_E4M4) == scale
    assert largest_value(scale, ROOT_E4M4) == largest


def test_to_nearest_even():
    codes, one = torch.arange(1, 255, dtype=torch.int16).to(torch.uint8), torch.ones(())
    roots = KERNELS.dequantize(ScaledTensor(codes, one, ROOT_E4M4)).sqrt()
    above = KERNELS.dequantize(ScaledTensor(codes + 1, one, ROOT_E4M4)).sqrt()
    middle = (roots + above) / 2
    for root, expected in (
        (middle * (1 - 1e-5), codes),
        (middle * (1 + 1e-5), codes + 1),
        (middle, codes + codes % 2),  # its square is exact in fp32, and so is the root of that
    ):
        assert torch.equal(KERNELS.cast(root.square(), one, ROOT_E4M4), expected)


@pytest.mark.parametrize("value", [1e-9, 3e-6, 0.01, 0.2, 0.99])
def test_the_mean_of_what_is_stored_is_the_value(value):
    count = 1 << 16
    noise = noise_bits(torch.arange(count, dtype=torch.int32), 7)
    scale = scale_from_amax(ONE, ROOT_E4M4)
    codes = cast_stochastic(torch.full((count,), value), scale, ROOT_E4M4, noise)
    stored = KERNELS.dequantize(ScaledTensor(codes, scale, ROOT_E4M4)).double()
    assert len(stored.unique()) <= 2
    # Four standard deviations of the mean.
    assert abs(stored.mean().item() - value) <= 4 * stored.std().item() / count**0.5 + 1e-7 * value


def test_nan_and_infinity_survive():
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    scale = scale_from_amax(values.max(), ROOT_E4M4)
    for codes in (
        KERNELS.cast(values, scale, ROOT_E4M4),
        cast_stochastic(values, scale, ROOT_E4M4, torch.zeros(3, dtype=torch.int32)),
    ):
        assert KERNELS.dequantize(ScaledTensor(codes, scale, ROOT_E4M4)).isnan().all()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_an_average_over_many_steps_has_no_drift(beta2):
    """It moves by 0.1 % of itself a step, in a format whose steps are 6 to 12 %."""
    w = {"linear": matrix(E4M3, FP32, (256, 256))}
    adam = optimizer(w, ROOT, adam_beta2=beta2, clip_grad=0.0, weight_decay=0.0)
    expected = torch.zeros(256, 256, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 0, 256)[:, None]
    for _ in range(300):
        gradient = torch.randn(256, 256, generator=generator) * spread
        set_gradients(w, {"linear": gradient})
        adam.step(LR)
        expected = beta2 * expected + (1 - beta2) * gradient.double().square()
    stored = KERNELS.dequantize(adam.states["linear"].exp_avg_sq).double()
    ratio = (stored / expected).mean(dim=1)  # of elements of one size
    assert ((ratio - 1).abs() < 0.05).all()
    assert abs(ratio.mean().item() - 1) < 0.005


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_steps_without_a_gradient_leave_nothing_behind(size):
    """The moment of a weight that had none yet is 0, not what the smallest code is with scale 1."""

    def weights_after(exp_avg_sq):
        w = {"linear": matrix(E4M3, FP32, (32, 32))}
        precision = state_precision("fp32", "fp32", exp_avg_sq)
        adam = optimizer(w, precision, clip_grad=0.0, weight_decay=0.0)
        start = KERNELS.dequantize(adam.states["linear"].master).clone()
        for gradient in (torch.zeros(32, 32), torch.zeros(32, 32), torch.full((32, 32), size)):
            set_gradients(w, {"linear": gradient})
            adam.step(LR)
        return KERNELS.dequantize(adam.states["linear"].master) - start

    torch.testing.assert_close(
        weights_after("fp8_e4m4_root"), weights_after("fp32"), rtol=0.1, atol=0.0
    )


def test_an_update_is_cut_off_where_no_gradients_can_have_led():
    w = {"linear": matrix(E4M3, FP32, (16, 16))}
    adam = optimizer(w, ROOT, clip_grad=0.0, weight_decay=0.0)
    set_gradients(w, {"linear": torch.ones(16, 16)})
    adam.step(LR)
    state = adam.states["linear"]
    state.exp_avg_sq.payload.fill_(1)  # as if every rounding had gone down
    before = KERNELS.dequantize(state.master).clone()
    set_gradients(w, {"linear": torch.zeros(16, 16)})
    adam.step(LR)
    moved = (KERNELS.dequantize(state.master) - before).abs()
    assert moved.max() > 2 * LR  # far beyond a usual step
    bound = update_bound(coefficients(adam.config.adam_beta1, adam.config.adam_beta2, steps=2))
    assert (moved <= LR * bound * (1 + 1e-5)).all()
