"""Stochastic rounding of the master: keeps updates that nearest loses, from noise of its own."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.numerics import BF16, E4M3, FP16
from tests.optim.bench import (
    KERNELS,
    all_bytes,
    assert_same_bytes,
    matrix,
    optimizer,
    set_gradients,
    state_precision,
    step,
    weights,
)

SHAPE = (64, 64)


def drift(master, *, stochastic, lr, steps):
    """Mean of a master that starts at 1 and gets an update of exactly `lr` in every step."""
    w = {"linear": matrix(BF16, E4M3, SHAPE)}
    precision = state_precision(master, "fp32", "fp32", stochastic=stochastic)
    values = {"linear": torch.ones(SHAPE)}
    adam = optimizer(w, precision, values=values, weight_decay=0.0, clip_grad=0.0)
    for _ in range(steps):
        set_gradients(w, {"linear": -torch.ones(SHAPE)})
        adam.step(lr)
    values = KERNELS.dequantize(adam.states["linear"].master).double()
    return values.mean().item() - 1.0


@pytest.mark.parametrize(("master", "bits"), [("fp16", 10), ("bf16", 7), ("fp8_e4m3", 3)])
def test_updates_below_half_a_unit(master, bits):
    unit, steps = 2.0**-bits, 16
    lr = unit / 8
    assert drift(master, stochastic=False, lr=lr, steps=steps) == 0.0
    # 16 steps of an eighth of a unit; variance of each at most unit^2 / 4.
    sigma = math.sqrt(steps / 4 / (64 * 64)) * unit
    moved = drift(master, stochastic=True, lr=lr, steps=steps)
    assert abs(moved - steps * lr) < 4.5 * sigma
    assert moved > 1.5 * unit


def test_updates_of_whole_units_do_not_depend_on_the_rounding():
    unit = 2.0**-10
    results = [drift("fp16", stochastic=s, lr=2 * unit, steps=5) for s in (False, True)]
    # Adam's eps and fp32 leave the update within 1e-6 of lr, so rounding may differ by that share.
    assert results[0] == 10 * unit
    assert abs(results[1] - 10 * unit) < 1e-3 * unit


def masters(**options):
    """The master of two weights with equal values and gradients after one step."""
    w = {"one": matrix(E4M3, E4M3, SHAPE), "two": matrix(E4M3, E4M3, SHAPE)}
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    precision = state_precision(stochastic=True)
    adam = optimizer(w, precision, values={"one": value, "two": value}, **options)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    set_gradients(w, {"one": gradient, "two": gradient})
    adam.step(1e-4)
    return [state.master.payload for state in adam.states.values()]


def test_noise_depends_on_name_and_seed_and_nothing_else():
    first, second = masters(seed=1)
    assert not torch.equal(first, second)
    other, _ = masters(seed=2)
    assert not torch.equal(first, other)
    torch.manual_seed(123)
    assert torch.equal(masters(seed=1)[0], first)


def test_noise_depends_on_the_step():
    # With lr 0 and no decay, a new draw of noise is all that could change a value between units;
    # FP16 values are on units, so draws are compared on the way from 1 to 1 + unit / 2.
    ups = []
    for steps in (1, 2):
        w = {"linear": matrix(BF16, E4M3, SHAPE)}
        precision = state_precision("fp16", "fp32", "fp32", stochastic=True)
        adam = optimizer(w, precision, values={"linear": torch.ones(SHAPE)}, weight_decay=0.0)
        adam.num_steps.fill_(steps)
        set_gradients(w, {"linear": -torch.ones(SHAPE)})
        adam.amax[0, 1:] = 1e-3
        adam.step(2.0**-11)
        ups.append(KERNELS.dequantize(adam.states["linear"].master) > 1.0)
    both = (ups[0] & ups[1]).double().mean().item()
    shares = [up.double().mean().item() for up in ups]
    assert all(0.05 < share < 0.95 for share in shares)
    expected = shares[0] * shares[1]
    assert abs(both - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 4096)


def test_seed_does_not_matter_to_nearest():
    results = []
    for seed in (1, 2):
        adam = optimizer(weights(), state_precision(stochastic=False), seed=seed)
        step(adam, 0)
        results.append(all_bytes(adam))
    assert_same_bytes(*results)


@pytest.mark.parametrize("fmt", [E4M3, FP16], ids=repr)
def test_compute_copy_is_rounded_to_nearest_from_the_fp32_value(fmt):
    payloads = []
    for seed in (1, 2):
        adam = optimizer(weights(fmt), state_precision(stochastic=True), seed=seed)
        step(adam, 0)
        payloads.append(adam.weights["linear"].payload.clone())
    assert torch.equal(*payloads)
