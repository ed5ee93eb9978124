"""A step with anything non-finite in any gradient changes no byte, and leaves no trace later."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.numerics import BF16, E4M3, FP16, FP32
from fp8lm.training.state import optimizer_tensors
from tests.optim.bench import (
    LR,
    all_bytes,
    assert_same_bytes,
    optimizer,
    random_gradients,
    set_gradients,
    state_precision,
    step,
    weights,
)

SETTINGS = {
    "o3": (E4M3, E4M3, ("fp16", "fp8_e4m3", "fp16")),
    "o2": (FP16, E4M3, ("none", "fp8_e4m3", "fp16")),
    "bf16": (BF16, FP32, ("fp32", "fp32", "fp32")),
    "fp32": (FP32, FP32, ("fp32", "fp32", "fp32")),
    "bf16 gradients": (E4M3, BF16, ("bf16", "fp8_e5m2", "bf16")),
}
EVENTS = [math.nan, math.inf, -math.inf]


def make(setting, device="cpu", **config):
    fmt, grad, states = SETTINGS[setting]
    w = weights(fmt, grad, FP32 if fmt == FP32 else BF16, torch.device(device))
    return optimizer(w, state_precision(*states, stochastic=True), **config)


def bad_step(adam, name, event):
    gradients = random_gradients(adam.weights, 77)
    gradients[name].view(-1)[5] = event
    set_gradients(adam.weights, gradients)
    return adam.step(LR)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["linear", "embedding", "norm"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_not_a_byte_changes(setting, name, event, steps_before):
    adam = make(setting)
    for seed in range(steps_before):
        step(adam, seed)
    before = all_bytes(adam)
    norm = bad_step(adam, name, event)
    assert norm.skip
    assert not norm.norm.isfinite()
    assert_same_bytes(before, all_bytes(adam))


@pytest.mark.parametrize("setting", SETTINGS)
def test_later_steps_are_as_if_it_had_not_been(setting):
    adam, undisturbed = make(setting), make(setting)
    for seed in range(6):
        if seed in (0, 2, 3):
            for event in EVENTS:
                assert bad_step(adam, "linear", event).skip
        assert not step(adam, seed).skip
        step(undisturbed, seed)
    assert_same_bytes(all_bytes(adam), all_bytes(undisturbed))
    assert adam.num_steps == 6


def test_a_nan_scale_alone_skips():
    adam = make("o3")
    step(adam, 0)
    before = all_bytes(adam)
    set_gradients(adam.weights, random_gradients(adam.weights, 1))
    adam.weights["linear"].main_grad.value.scale.fill_(math.nan)
    assert adam.step(LR).skip
    assert_same_bytes(before, all_bytes(adam))


@pytest.mark.parametrize("scalar", ["loss", "stop"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_scalar_that_is_not_finite_skips(event, scalar):
    adam = make("o3")
    step(adam, 0)
    before = all_bytes(adam)
    set_gradients(adam.weights, random_gradients(adam.weights, 1))
    norm = adam.step(LR, **{scalar: torch.tensor(event)})
    assert norm.skip and norm.norm.isfinite()
    assert_same_bytes(before, all_bytes(adam))
    assert not adam.step(LR, **{scalar: torch.ones(())}).skip


def test_a_norm_that_overflows_skips():
    adam = make("fp32")
    before = all_bytes(adam)
    gradients = random_gradients(adam.weights, 1)
    gradients["linear"][0, :2] = 3e38
    set_gradients(adam.weights, gradients)
    assert adam.step(LR).skip
    assert_same_bytes(before, all_bytes(adam))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_gradient_whose_square_overflows_skips_unless_it_is_clipped(setting):
    for clip_grad, skips in ((0.0, True), (1.0, False), (1e18, False), (1e25, True)):
        adam = make(setting, clip_grad=clip_grad)
        before = all_bytes(adam)
        gradients = random_gradients(adam.weights, 1)
        gradients["embedding"][3, 2] = 3e19  # fp32 ends at 3.4e38
        set_gradients(adam.weights, gradients)
        norm = adam.step(LR)
        assert norm.norm.isfinite()
        assert bool(norm.skip) == skips
        if norm.skip:
            assert_same_bytes(before, all_bytes(adam))
        else:
            assert all(t.float().isfinite().all() for t in optimizer_tensors(adam).values())


def test_skip_flag_is_a_tensor():
    norm = step(make("o3"), 0)
    for value in (norm.norm, norm.clip_factor, norm.skip):
        assert isinstance(value, torch.Tensor)
        assert value.ndim == 0


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("event", EVENTS)
def test_not_a_byte_changes_where_the_flag_stays_on_the_device(setting, event):
    adam, undisturbed = make(setting, "cuda"), make(setting, "cuda")
    for seed in range(3):
        before = all_bytes(adam)
        assert bad_step(adam, "linear", event).skip
        assert_same_bytes(before, all_bytes(adam))
        step(adam, seed)
        step(undisturbed, seed)
    assert_same_bytes(all_bytes(adam), all_bytes(undisturbed))
