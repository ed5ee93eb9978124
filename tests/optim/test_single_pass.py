"""Scales predicted before a step against an oracle that computes the step first, then its amax."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels.adam import AdamFactors, adam_
from fp8lm.kernels.adam_table import AdamCoefficients
from fp8lm.numerics import BF16, E4M3, FP16, FP32
from fp8lm.optim.bounds import update_bound
from tests.optim.bench import (
    KERNELS,
    LR,
    matrix,
    optimizer,
    random_gradients,
    set_gradients,
    state_precision,
    step,
    vector,
    weights,
)

# Rows of Table 6 of FP8-LM, the presets and more: weight, (master, m, v).
SETTINGS = {
    "#0": (FP32, ("fp32", "fp32", "fp32")),
    "#1": (BF16, ("fp32", "fp32", "fp32")),
    "#2a": (E4M3, ("fp16", "fp8_e4m3", "fp16")),
    "#2b": (E4M3, ("bf16", "fp8_e4m3", "fp16")),
    "#3": (E4M3, ("fp8_e4m3", "fp8_e4m3", "fp16")),
    "o1": (FP16, ("none", "fp32", "fp32")),
    "o2": (FP16, ("none", "fp8_e4m3", "fp16")),
    "fp32 master of fp8": (E4M3, ("fp32", "fp32", "fp32")),
    "bf16 moments": (E4M3, ("fp16", "bf16", "bf16")),
    "e5m2 moment": (E4M3, ("fp16", "fp8_e5m2", "fp32")),
    "o4": (E4M3, ("fp16", "fp8_e4m3", "fp8_e4m4_root")),
}
# v in FP8 rounds small squares to zero, so updates have no bound: what is beyond saturates.
UNBOUNDED = {
    "#4": (E4M3, ("fp16", "fp8_e4m3", "fp8_e4m3")),
    "e5m2 moments": (E4M3, ("fp16", "fp8_e5m2", "fp8_e5m2")),
}


def two_pass(adam, name, lr, clip_factor=1.0):
    """The exact new master, m and v of one weight, in float64, from its stored states."""
    weight, config = adam.weights[name], adam.config
    w, m, v = (KERNELS.dequantize(t).double() for t in adam.states[name].stored)
    g = KERNELS.dequantize(weight.main_grad.value).double() * clip_factor
    n = adam.num_steps.item() + 1
    m = config.adam_beta1 * m + (1 - config.adam_beta1) * g
    v = config.adam_beta2 * v + (1 - config.adam_beta2) * g * g
    m_hat, v_hat = m / (1 - config.adam_beta1**n), v / (1 - config.adam_beta2**n)
    decay = config.weight_decay * weight.spec.decay
    return w * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + config.adam_eps), m, v


def assert_stored(tensor, exact, ulps):
    """`tensor` holds `exact` to `ulps` units of its format; nothing was saturated."""
    fmt, scale, stored = tensor.format, tensor.scale.double(), KERNELS.dequantize(tensor).double()
    if fmt.root:  # stochastic, and never 0
        assert (tensor.payload != 0).all()
        exact, stored, ulps = exact.sqrt(), stored.sqrt(), 1.0
    largest = exact.abs().max()
    assert largest * scale <= fmt.max
    unit = torch.clamp(2.0**-fmt.mantissa_bits * exact.abs(), min=fmt.smallest_subnormal / scale)
    arithmetic = 1e-6 * largest  # fp32, with cancellation
    error = (stored - exact).abs()
    assert (error <= ulps * unit + arithmetic).all()


def amplitudes(count):
    """Gradients that are steady, then spike, vanish, are exactly zero, return, grow and shrink."""
    generator = torch.Generator().manual_seed(0)
    events = [1.0] * 12 + [1e4] + [1.0] * 8 + [1e-6] * 12 + [0.0] * 8 + [1e3] + [1e-3] * 8
    walk = torch.exp(torch.randn(count - len(events), generator=generator)).cumprod(0)
    return events + walk.clamp(1e-10, 1e5).tolist()


def set_signed_gradients(w, seed, amplitude):
    """Random gradients, in every third step all of one sign, which moves weights furthest."""
    gradients = random_gradients(w, seed, amplitude * 1e-2)
    if seed % 3 == 0:
        gradients = {name: gradient.abs() for name, gradient in gradients.items()}
    set_gradients(w, gradients)


def check_every_step(setting, *, stochastic, clip, steps):
    fmt, states = SETTINGS[setting]
    w = {"linear": matrix(fmt, FP32 if fmt in (FP32, BF16) else E4M3, (8, 24))}
    w["norm"] = vector(FP32 if fmt == FP32 else BF16)
    adam = optimizer(w, state_precision(*states, stochastic=stochastic), clip_grad=clip)
    for seed, amplitude in enumerate(amplitudes(steps)):
        lr = LR * (1 + seed % 5)
        set_signed_gradients(w, seed, amplitude)
        factor = clip_factor(w, clip)
        expected = {name: two_pass(adam, name, lr, factor) for name in w}
        assert not adam.step(lr).skip
        for name, (master, *moments) in expected.items():
            state = adam.states[name]
            ulps = 1.0 if stochastic else 0.5
            assert_stored(state.master, master, ulps)
            assert_stored(state.exp_avg, moments[0], 0.5)
            assert_stored(state.exp_avg_sq, moments[1], 0.5)
            if state.owns_master:  # the compute copy is always rounded to the nearest
                assert_stored(w[name].model_param, master, 0.5)


def clip_factor(w, clip):
    squares = (
        KERNELS.dequantize(v.main_grad.value).double().square().sum().item() for v in w.values()
    )
    return min(1.0, clip / (math.sqrt(sum(squares)) + 1e-6)) if clip else 1.0


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_step_stores_the_oracles_values(setting):
    check_every_step(setting, stochastic=False, clip=0.0, steps=70)


@pytest.mark.parametrize("setting", ["#2a", "#2b", "#3", "o2", "o4"])
def test_every_step_with_clipping_and_stochastic_rounding(setting):
    check_every_step(setting, stochastic=True, clip=1.0, steps=70)


def test_hundreds_of_steps_of_the_default():
    check_every_step("#2a", stochastic=True, clip=0.0, steps=300)


@pytest.mark.parametrize("setting", ["#2a", "o2", "#3"])
def test_bytes_are_those_of_two_passes(setting):
    # Scales are powers of two: outside the subnormals a predicted one rounds as the true one.
    fmt, states = SETTINGS[setting]
    w = {"linear": matrix(fmt, E4M3, (8, 24))}
    adam = optimizer(w, state_precision(*states), clip_grad=0.0)
    for seed, amplitude in enumerate(amplitudes(70)):
        set_signed_gradients(w, seed, amplitude)
        state = adam.states["linear"]
        exact = [KERNELS.dequantize(stored) for stored in state.stored]
        gradient = KERNELS.dequantize(w["linear"].main_grad.value)
        factors = AdamFactors.of(coefficients(0.9, 0.95, seed + 1), 0.1)
        adam_(exact[0], gradient, *exact[1:], factors)
        adam.step(LR)
        for stored, value in zip(state.stored, exact, strict=True):
            expected = KERNELS.dequantize(KERNELS.quantize(value, stored.format))
            normal = value.abs() * stored.scale >= stored.format.smallest_normal
            assert torch.equal(KERNELS.dequantize(stored)[normal], expected[normal])


@pytest.mark.parametrize("setting", SETTINGS)
def test_collected_amax_is_that_of_the_new_values(setting):
    fmt, states = SETTINGS[setting]
    w = weights(fmt)
    adam = optimizer(w, state_precision(*states), clip_grad=0.0)
    for seed in range(5):
        set_signed_gradients(w, seed, 1.0)
        expected = [two_pass(adam, name, LR) for name in w]
        adam.step(LR)
        for row, exact, name in zip(adam.amax.tolist(), expected, w, strict=True):
            needed = [tensor.format.scaled for tensor in adam.states[name].stored]
            needed[0] |= w[name].model_param.format.scaled
            for kind in range(3):
                true = exact[kind].abs().max().item() if needed[kind] else 0.0
                assert row[kind] == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("setting", UNBOUNDED)
def test_updates_without_a_bound_saturate_instead_of_overflowing(setting):
    fmt, states = UNBOUNDED[setting]
    w = weights(fmt)
    adam = optimizer(w, state_precision(*states), clip_grad=0.0)
    saturated = 0
    for seed, amplitude in enumerate(amplitudes(70)):
        set_signed_gradients(w, seed, amplitude)
        exact = two_pass(adam, "linear", LR)[0]
        adam.step(LR)
        saturated += bool(exact.abs().max() * w["linear"].model_param.scale > fmt.max)
        for name, weight in w.items():
            for tensor in (*adam.states[name].stored, weight.model_param):
                assert KERNELS.dequantize(tensor).isfinite().all()
        assert_amax_of_what_is_stored(adam)
    assert saturated or setting != "#4"  # otherwise this test shows nothing


def assert_amax_of_what_is_stored(adam):
    """Else the scale of a saturated state would make room for what it lost."""
    for row, state in zip(adam.amax.tolist(), adam.states.values(), strict=True):
        for amax, tensor in zip(row, state.stored, strict=True):
            largest = KERNELS.dequantize(tensor).abs().max().item()
            assert amax == pytest.approx(largest, rel=2.0**-tensor.format.mantissa_bits)


@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_a_master_without_a_scale_does_not_saturate_and_its_copy_follows(master):
    w = {"linear": matrix(E4M3, E4M3, (8, 24))}
    adam = optimizer(w, state_precision(master, "fp8_e4m3", "fp8_e4m3"), clip_grad=0.0)
    for seed in range(3):
        step(adam, seed)
    # What rounding in FP8 can do to v: the next update is far beyond any bound.
    adam.states["linear"].exp_avg_sq.payload.zero_()
    set_gradients(w, {"linear": torch.zeros(8, 24)})
    exact = two_pass(adam, "linear", LR)[0]
    adam.step(LR)
    assert exact.abs().max() * w["linear"].scale > 2 * E4M3.max  # the copy could not know
    assert_stored(adam.states["linear"].master, exact, 0.5)
    assert adam.amax[0, 0] == pytest.approx(exact.abs().max().item(), rel=1e-5)
    step(adam, 3)
    master_value = KERNELS.dequantize(adam.states["linear"].master).double()
    assert_stored(w["linear"].model_param, master_value, 0.75)  # the master was rounded itself


def largest_update(beta1, beta2, steps):
    """|m_hat| / sqrt(v_hat) of the gradient history that makes it largest, in float64."""
    age = torch.arange(steps, dtype=torch.float64)
    g = (beta1 / beta2) ** age  # equality in Cauchy-Schwarz
    m, v = (1 - beta1) * (beta1**age * g).sum(), (1 - beta2) * (beta2**age * g * g).sum()
    return (m / (1 - beta1**steps) / (v / (1 - beta2**steps)).sqrt()).item()


def coefficients(beta1, beta2, steps):
    corrections = (torch.tensor(1 - beta**steps) for beta in (beta1, beta2))  # fp32
    return AdamCoefficients(
        beta1, beta2, 1e-8, LR, torch.ones(()), *corrections, None, torch.tensor(False)
    )


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.5, 0.3)])
@pytest.mark.parametrize("steps", [1, 2, 10, 100, 300])
def test_update_bound_is_above_the_worst_history(beta1, beta2, steps):
    bound = update_bound(coefficients(beta1, beta2, steps)).item()
    assert bound >= 2.0 * largest_update(beta1, beta2, steps) * (1 - 1e-6)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.999)])
def test_update_bound_is_tight_after_many_steps(beta1, beta2):
    bound = update_bound(coefficients(beta1, beta2, 20000)).item()
    assert bound <= 2.0 * largest_update(beta1, beta2, 20000) * 1.001


# b1^2 >= b2: no bound exists, and 1 - b2^n is 1 in fp32 after a few steps.
@pytest.mark.parametrize("betas", [(0.9, 0.81), (0.9, 0.8), (0.9, 0.5), (0.99, 0.9), (0.0, 0.0)])
def test_unusual_betas_keep_weights_finite_and_their_size(betas):
    w = weights()
    adam = optimizer(w, adam_beta1=betas[0], adam_beta2=betas[1], clip_grad=0.0)
    for seed in range(100):
        step(adam, seed)
    for weight in w.values():
        assert KERNELS.dequantize(weight.model_param).isfinite().all()
    values = KERNELS.dequantize(w["linear"].model_param)
    master = KERNELS.dequantize(adam.states["linear"].master)
    assert (values - master).norm() < 0.05 * master.norm()
