"""AdamW: torch's own in fp32, every combination of formats, what decays, what is kept where."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8lm.checkpoint import StateKey
from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import BF16, E2M5, E4M3, FP16, FP32
from fp8lm.optim import StatePrecision
from fp8lm.training.state import optimizer_tensors
from tests.optim.bench import (
    FP32_STATES,
    KERNELS,
    LR,
    all_bytes,
    assert_same_bytes,
    initial,
    matrix,
    optimizer,
    random_gradients,
    set_gradients,
    state_precision,
    step,
    vector,
    weights,
)


def torch_adamw(values, config):
    """torch.optim.AdamW over copies of `values`; norms do not decay."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    groups = [
        dict(params=[p], weight_decay=0.0 if name == "norm" else config.weight_decay)
        for name, p in parameters.items()
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return parameters, torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9)])
def test_fp32_is_torchs_adamw(clip, betas):
    w = weights(FP32, FP32, FP32)
    config = dict(clip_grad=clip, adam_beta1=betas[0], adam_beta2=betas[1], weight_decay=0.2)
    adam = optimizer(w, FP32_STATES, **config)
    parameters, reference = torch_adamw(initial(w), adam.config)
    for seed in range(20):
        lr = LR * (1 + seed % 4)
        gradients = random_gradients(w, seed, amplitude=10.0 ** (seed % 5 - 4))
        set_gradients(w, gradients)
        adam.step(lr)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for name, parameter in parameters.items():
            # fp32 roundings of 20 updates, relative to the update's size where they cancel.
            torch.testing.assert_close(
                w[name].model_param.payload.detach(),
                parameter.detach(),
                rtol=1e-6,
                atol=20 * lr * 1e-6,
            )
            assert torch.equal(adam.states[name].master.payload, w[name].model_param.payload)


MASTERS = ["fp32", "fp16", "bf16", "fp8_e4m3"]
MOMENTS = ["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize(("exp_avg", "exp_avg_sq"), [*itertools.product(MOMENTS, MOMENTS)])
def test_first_step_of_every_combination(master, exp_avg, exp_avg_sq):
    # Moments start from zero, so the first step's values do not depend on any format; each is
    # rounded once. (That later steps do the same is shown against the two-pass oracle.)
    w = weights()
    adam = optimizer(w, state_precision(master, exp_avg, exp_avg_sq))
    state, start = adam.states["linear"], KERNELS.dequantize(adam.states["linear"].master).clone()
    step(adam, 0)
    g = KERNELS.dequantize(w["linear"].main_grad.value)
    new = start * (1 - LR * 0.1) - LR * g / (g.abs() + 1e-8)
    assert [t.format.name for t in state.stored] == [master, exp_avg, exp_avg_sq]
    for tensor, value in zip(state.stored, (new, 0.1 * g, 0.05 * g * g), strict=True):
        # Half a unit, half a subnormal, the fp32 of both sides.
        fmt, scale = tensor.format, tensor.scale
        unit = (2.0**-fmt.mantissa_bits * value.abs()).clamp(min=fmt.smallest_subnormal / scale)
        error = (KERNELS.dequantize(tensor) - value).abs()
        assert (error <= 0.5 * unit + 1e-6 * value.abs().max()).all()


@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o2", "o3", "o4"])
def test_presets_follow_fp32(preset):
    keys = PrecisionConfig(preset=preset)
    formats = {"bf16": BF16, "te": BF16, "o1": FP16, "o2": FP16, "o3": E4M3, "o4": E4M3}
    low = weights(formats[preset], FP32 if preset in ("bf16", "te") else E4M3)
    high = weights(FP32, FP32, FP32)
    adam, exact = optimizer(low, StatePrecision.from_config(keys)), optimizer(high, FP32_STATES)
    start = {name: weight.model_param.payload.detach().clone() for name, weight in high.items()}
    for seed in range(30):
        # A steady gradient and noise of its size, so that weights go somewhere.
        steady, noise = random_gradients(low, 1000), random_gradients(low, seed)
        gradients = {name: steady[name] + noise[name] for name in low}
        set_gradients(low, gradients)
        set_gradients(high, gradients)
        adam.step(LR)
        exact.step(LR)
    for name in low:
        moved = high[name].model_param.payload.detach() - start[name]
        error = KERNELS.dequantize(adam.states[name].master) - high[name].model_param.payload
        # Gradient and m in E4M3 are 2.6 % off each, per step; 10 % of the way is generous.
        assert error.norm() < 0.1 * moved.norm(), name


@pytest.mark.parametrize("dense", [BF16, FP32], ids=repr)
def test_only_matrices_decay(dense):
    w = weights(FP32, FP32, dense)
    adam = optimizer(w, FP32_STATES, weight_decay=0.5)
    set_gradients(w, {name: torch.zeros(weight.spec.shape) for name, weight in w.items()})
    for _ in range(3):
        adam.step(0.1)
    for name, value in initial(w).items():
        factor = 1.0 if name == "norm" else (1 - 0.1 * 0.5) ** 3
        torch.testing.assert_close(adam.states[name].master.payload, value * factor)
    torch.testing.assert_close(
        w["norm"].model_param.payload, initial(w)["norm"].to(dense.dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize("master", ["fp16", "none"])
def test_first_step_without_any_gradient(master):
    w = weights(FP16)
    adam = optimizer(w, state_precision(master), weight_decay=0.0)
    set_gradients(w, {name: torch.zeros(weight.spec.shape) for name, weight in w.items()})
    before = {name: KERNELS.dequantize(state.master) for name, state in adam.states.items()}
    assert not adam.step(LR).skip
    for name, state in adam.states.items():
        assert torch.equal(KERNELS.dequantize(state.master), before[name])
        for moment in (state.exp_avg, state.exp_avg_sq):
            assert (KERNELS.dequantize(moment) == 0).all()


def test_a_weight_of_zeros_starts_to_move():
    w = {"bias": vector(BF16)}
    adam = optimizer(w, values={"bias": torch.zeros(40)})
    step(adam, 0)
    assert w["bias"].model_param.payload.abs().min() >= 0.99 * LR


@pytest.mark.parametrize("fmt", [E4M3, FP16, BF16], ids=repr)
@pytest.mark.parametrize("master", ["fp32", "fp16", "bf16", "none"])
def test_initialize(fmt, master):
    w = weights(fmt)
    adam = optimizer(w, state_precision(master))
    for row, (name, value) in zip(adam.amax, initial(w).items(), strict=True):
        state, compute = adam.states[name], w[name].model_param
        assert row.tolist() == [value.abs().max().item(), 0.0, 0.0]
        expected = KERNELS.quantize(value, compute.format)
        assert torch.equal(compute.payload, expected.payload)
        assert compute.scale == expected.scale
        assert state.owns_master is not (master == "none" and compute.format.scaled)
        if state.owns_master:
            fmt_name = "fp16" if master == "none" else master
            assert state.master.format.name == fmt_name
            rounded = KERNELS.quantize(value, state.master.format)
            assert torch.equal(state.master.payload, rounded.payload)
        else:
            assert state.master.payload.data_ptr() == compute.payload.data_ptr()
        for moment in (state.exp_avg, state.exp_avg_sq):
            assert (KERNELS.dequantize(moment) == 0).all()


@pytest.mark.parametrize(
    ("fmt", "grad", "states", "nbytes"),
    [
        (E4M3, E4M3, ("fp16", "fp8_e4m3", "fp16"), 7),  # the paper's 6 and the compute copy
        (E4M3, E4M3, ("fp16", "fp8_e4m3", "fp8_e4m4_root"), 6),
        (FP16, E4M3, ("none", "fp8_e4m3", "fp16"), 6),
        (FP16, E4M3, ("none", "fp32", "fp32"), 11),
        (BF16, FP32, ("fp32", "fp32", "fp32"), 18),
    ],
)
def test_bytes_per_parameter(fmt, grad, states, nbytes):
    w = {"linear": matrix(fmt, grad, (128, 128))}
    state = optimizer(w, state_precision(*states)).states["linear"]
    held = [w["linear"].model_param, w["linear"].main_grad.value, state.exp_avg, state.exp_avg_sq]
    held += [state.master] if state.owns_master else []
    scales = sum(4 for tensor in held if tensor.format.scaled)
    assert sum(tensor.nbytes for tensor in held) == nbytes * 128 * 128 + scales


@pytest.mark.parametrize("master", ["fp16", "none", "fp32"])
def test_stored_tensors_are_all_that_a_step_depends_on(master):
    def fresh(seed):
        w = weights(FP16)
        values = initial(w, seed)
        return optimizer(w, state_precision(master, stochastic=True), values=values)

    trained, resumed = fresh(0), fresh(1)
    for seed in range(5):
        step(trained, seed)
    for key, tensor in optimizer_tensors(trained).items():
        optimizer_tensors(resumed)[key].copy_(tensor)
    for name, weight in trained.weights.items():
        resumed.weights[name].model_param.copy_(weight.model_param)
    for adam in (trained, resumed):
        for seed in range(5, 10):
            step(adam, seed)
    assert_same_bytes(all_bytes(trained), all_bytes(resumed))


def test_a_master_that_is_the_weight_is_not_stored_twice():
    keys = optimizer_tensors(optimizer(weights(FP16), state_precision("none")))
    assert StateKey("master", "linear", "payload") not in keys
    assert StateKey("master", "norm", "payload") in keys
    assert len(keys) == 1 + 3 + 3 * 4 + 2 * 2


@pytest.mark.parametrize("states", [("fp16", "fp8_e4m3", "fp16"), ("fp32", "fp32", "fp32")])
@pytest.mark.parametrize("stochastic", [False, True])
def test_result_does_not_depend_on_the_size_of_blocks(states, stochastic):
    results = []
    for block in (1 << 16, 100):
        adam = optimizer(weights(), state_precision(*states, stochastic=stochastic), clip_grad=0.0)
        adam.kernels = ReferenceKernels(step_elements=block)
        for seed in range(3):
            step(adam, seed)
        results.append(all_bytes(adam))
    assert_same_bytes(*results)


def test_a_weight_larger_than_a_block():
    w = {"large": matrix(E4M3, E4M3, (257, 256)), "small": matrix(E4M3, E4M3, (8, 16))}
    adam = optimizer(w, clip_grad=0.0)
    start = KERNELS.dequantize(adam.states["large"].master)
    step(adam, 0)
    g = KERNELS.dequantize(w["large"].main_grad.value)
    exact = start * (1 - LR * 0.1) - LR * g / (g.abs() + 1e-8)
    master = KERNELS.dequantize(adam.states["large"].master)
    torch.testing.assert_close(master, exact, rtol=2.0**-11, atol=1e-7)
    assert adam.amax[0, 0] == pytest.approx(exact.abs().max().item(), rel=1e-6)


def test_a_gradient_in_blocks_steps_as_its_values_do():
    """And its norm and amax are theirs, to the bit."""
    kernels = ReferenceKernels(step_elements=256)
    results, norms = [], []
    for fmt in (E2M5, FP32):
        w = {"large": matrix(E4M3, fmt, (24, 128)), "small": matrix(E4M3, fmt, (8, 48))}
        adam = optimizer(w, clip_grad=0.1)
        adam.kernels = kernels
        blocks = {name: matrix(E4M3, E2M5, weight.spec.shape) for name, weight in w.items()}
        gradients = random_gradients(w, 0, amplitude=10.0)  # clipped
        set_gradients(blocks, gradients)
        values = {name: KERNELS.dequantize(b.main_grad.value) for name, b in blocks.items()}
        set_gradients(w, gradients if fmt == E2M5 else values)
        norms.append(adam.step(LR))
        results.append(all_bytes(adam))
    assert_same_bytes(*results)
    assert norms[0].norm.equal(norms[1].norm) and norms[0].amax.equal(norms[1].amax)


def test_a_step_reads_gradients_only():
    w = weights(FP32, FP32, FP32)
    adam = optimizer(w, FP32_STATES)
    gradients = random_gradients(w, 0, amplitude=10.0)  # clipped
    set_gradients(w, gradients)
    adam.step(LR)
    for name, gradient in gradients.items():
        assert torch.equal(w[name].main_grad.value.payload, gradient)
