"""The global norm over all formats, each weight once; clipping reaches FP8 gradients too."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import named_params
from fp8lm.numerics import BF16, E4M3, FP32
from fp8lm.optim.clipping import gradient_norm
from tests.model.tiny import batch, build, loss_and_gradients
from tests.optim.bench import (
    KERNELS,
    LR,
    all_bytes,
    assert_same_bytes,
    optimizer,
    random_gradients,
    set_gradients,
    state_precision,
    weights,
)


def gradients_of(w, seed=0, amplitude=1e-2):
    set_gradients(w, random_gradients(w, seed, amplitude))
    return [weight.main_grad.value for weight in w.values()]


def exact_norm(gradients):
    return math.sqrt(sum(KERNELS.dequantize(g).double().square().sum().item() for g in gradients))


@pytest.mark.parametrize("grad", [E4M3, BF16, FP32], ids=repr)
@pytest.mark.parametrize("amplitude", [1e-12, 1e-2, 1e6])
def test_norm_and_amax_of_the_dequantized_gradients(grad, amplitude):
    gradients = gradients_of(weights(grad=grad), amplitude=amplitude)
    norm = gradient_norm(gradients, 1.0, KERNELS)
    assert norm.norm.item() == pytest.approx(exact_norm(gradients), rel=1e-5)
    assert norm.amax.tolist() == [KERNELS.dequantize(g).abs().max().item() for g in gradients]
    assert not norm.skip


# From just above the smallest normal float to just below the largest: squares are neither.
@pytest.mark.parametrize("value", [1e-37, 1e-23, 1e19, 1e30, 3e38])
def test_a_norm_whose_square_is_no_float(value):
    gradient = KERNELS.quantize(torch.tensor([value, 0.0]), FP32)
    norm = gradient_norm([gradient], 1.0, KERNELS)
    assert norm.norm.item() == pytest.approx(value, rel=1e-6)
    assert norm.clip_factor.item() == pytest.approx(min(1.0, 1.0 / (value + 1e-6)), rel=1e-6)
    assert not norm.skip


@pytest.mark.parametrize("block", [1, 100, 960])
@pytest.mark.parametrize("grad", [E4M3, FP32], ids=repr)
def test_norm_over_several_blocks(block, grad):
    gradients = gradients_of(weights(grad=grad))
    whole = gradient_norm(gradients, 1.0, KERNELS)
    norm = gradient_norm(gradients, 1.0, ReferenceKernels(step_elements=block))
    torch.testing.assert_close(norm.norm, whole.norm, rtol=1e-6, atol=0)
    assert torch.equal(norm.amax, whole.amax)


@pytest.mark.parametrize("clip", [0.1, 1.0, 100.0])
def test_factor_is_torchs(clip):
    gradients = gradients_of(weights(grad=FP32, dense=FP32), amplitude=0.1)
    parameter = torch.nn.Parameter(torch.zeros(sum(g.payload.numel() for g in gradients)))
    parameter.grad = torch.cat([g.payload.flatten() for g in gradients])
    before = parameter.grad.clone()
    total = torch.nn.utils.clip_grad_norm_([parameter], clip)
    norm = gradient_norm(gradients, clip, KERNELS)
    torch.testing.assert_close(norm.norm, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(before * norm.clip_factor, parameter.grad, rtol=1e-6, atol=0)


def test_a_gradient_that_counts_elsewhere_has_no_part_in_the_norm_but_its_faults_do():
    first, *others = gradients_of(weights())
    norm_owner = torch.tensor([False] + [True] * len(others))
    norm = gradient_norm([first, *others], 1.0, KERNELS, norm_owner=norm_owner)
    assert norm.norm.item() == pytest.approx(exact_norm(others), rel=1e-6) and not norm.skip
    first.scale.fill_(float("nan"))
    assert gradient_norm([first, *others], 1.0, KERNELS, norm_owner=norm_owner).skip


def test_zero_clip_means_none():
    assert gradient_norm(gradients_of(weights(), amplitude=1e3), 0.0, KERNELS).clip_factor == 1.0


def test_zero_gradients_have_norm_zero():
    norm = gradient_norm(gradients_of(weights(), amplitude=0.0), 1.0, KERNELS)
    assert (norm.norm.item(), norm.clip_factor.item(), norm.skip.item()) == (0.0, 1.0, False)


@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_fp8_gradients_are_clipped_as_their_values(clip):
    # Adam with clipped FP8 gradients is Adam with their dequantized values, clipped.
    low, high = weights(grad=E4M3), weights(grad=FP32)
    adam, reference = optimizer(low, clip_grad=clip), optimizer(high, clip_grad=0.0)
    for seed in range(4):
        gradients = gradients_of(low, seed, amplitude=0.1)
        factor = gradient_norm(gradients, clip, KERNELS).clip_factor
        assert factor < 0.5
        values = (KERNELS.dequantize(g) * factor for g in gradients)
        set_gradients(high, dict(zip(low, values, strict=True)))
        adam.step(LR)
        reference.step(LR)
    assert_same_bytes(all_bytes(adam), all_bytes(reference))


def test_clipping_reaches_the_moments_of_every_format():
    adam = optimizer(weights(grad=E4M3), state_precision("fp32", "fp32", "fp32"), clip_grad=0.1)
    gradients = gradients_of(adam.weights, amplitude=1.0)
    factor = 0.1 / (exact_norm(gradients) + 1e-6)
    adam.step(LR)
    for state, g in zip(adam.states.values(), gradients, strict=True):
        expected = 0.1 * factor * KERNELS.dequantize(g)
        torch.testing.assert_close(state.exp_avg.payload, expected, rtol=1e-5, atol=0)


def test_clipping_never_rounds_the_gradient_again():
    w = weights(grad=E4M3)
    gradients = gradients_of(w, amplitude=1.0)
    before = [g.payload.clone() for g in gradients]
    optimizer(w, clip_grad=0.01).step(LR)
    assert all(torch.equal(g.payload, b) for g, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("untied", [False, True])
def test_norm_of_a_model_counts_every_weight_once(untied):
    gpt = build(dict(untie_embeddings_and_output_weights=untied), dict(preset="o3"))
    _, gradients = loss_and_gradients(gpt, batch())
    expected = exact_norm(gradients.values())
    adam = optimizer(
        named_params(gpt),
        values={n: KERNELS.dequantize(w.model_param) for n, w in named_params(gpt).items()},
    )
    assert len(gradients) == len(adam.weights)
    assert adam.step(LR).norm.item() == pytest.approx(expected, rel=1e-5)
