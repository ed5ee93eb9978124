"""A step on several ranks is the step of one process: bytes, norm, clipping, skipping."""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import OptimizerConfig
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam, vector_spec
from fp8lm.layers.tp_context import NO_TP
from fp8lm.numerics import BF16, E4M3, FP32
from fp8lm.optim import AdamW
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.training.step import complete_gradients
from tests.optim.bench import all_bytes, state_precision
from tests.parallel.ranks import CPU, KERNELS, random, tensor_parallel

SHAPES = {"fc1": (32, 24), "fc2": (24, 32), "table": (40, 24)}


def optimizer(tp, stochastic):
    def init(tensor, generator):
        return tensor

    splits = {
        "fc1": tp.shard(0, 2),
        "fc2": tp.shard(1),
        "table": tp.shard(0),
    }
    weights = {
        name: QuantizedParam(
            ParamSpec(
                shape,
                init,
                BF16 if name == "table" else E4M3,
                FP32,
                shard_spec=splits[name],
            ),
            KERNELS,
            CPU,
        )
        for name, shape in SHAPES.items()
    }
    spec = vector_spec(24, 1.0, BF16, sequence_parallel=tp.sequence_parallel)
    weights["norm"] = VectorParam(spec, KERNELS, CPU)
    config = OptimizerConfig(lr=1e-2, clip_grad=0.1)
    precision = state_precision(stochastic=stochastic)
    adam = AdamW(
        weights, config, precision, KERNELS, seed=3, sharding=OptimizerSharding.build(weights, tp)
    )
    for seed, (name, weight) in enumerate(weights.items()):
        # The largest value lies on one rank only.
        value = random(*weight.spec.shape, seed=seed) * 0.02
        value.view(-1)[-1] = 3.0
        adam.initialize(name, value)
    return adam


def set_gradients(adam, step, fault_on=None):
    """This rank's parts of gradients that grow along each tensor; the norm's in equal shares."""
    for seed, weight in enumerate(adam.weights.values()):
        full = random(*weight.spec.shape, seed=100 * step + seed)
        full *= torch.linspace(0.01, 1.0, full.numel()).view_as(full)
        part = weight.spec.shard_spec.take(full)
        if weight.spec.sequence_parallel:
            part = part / adam.sharding.tp.size
        weight.main_grad.zero()
        weight.main_grad.add(part)
        if fault_on == adam.sharding.tp.rank:
            weight.main_grad.value.payload.view(-1)[3] = float("nan")
    gradients = {name: weight.main_grad.value for name, weight in adam.weights.items()}
    complete_gradients(adam.weights, gradients, adam.sharding.tp)


def step_both(stochastic, sequence_parallel):
    """Steps with one and with several ranks must give the same bytes."""
    tp = tensor_parallel(sequence_parallel=sequence_parallel)
    whole, part = optimizer(NO_TP, stochastic), optimizer(tp, stochastic)
    norms = []
    for step in range(4):
        for adam in (whole, part):
            set_gradients(adam, step)
            norms.append(adam.step(1e-2))
    part.share_amax()
    for name, weight in part.weights.items():
        take = weight.spec.shard_spec.take
        pairs = zip(
            (weight.model_param, *part.states[name].stored),
            (whole.weights[name].model_param, *whole.states[name].stored),
            strict=True,
        )
        for kind, (mine, full) in enumerate(pairs):
            assert torch.equal(mine.scale, full.scale), (name, kind)
            different = (mine.payload != take(full.payload)).float().mean()
            # The norm's sum of squares is rounded in another order, and with it the clip factor.
            assert different < 0.01, (name, kind)
    torch.testing.assert_close(part.amax, whole.amax, rtol=1e-6, atol=0)
    torch.testing.assert_close(part.params_norm(), whole.params_norm())
    for one, several in zip(norms[::2], norms[1::2], strict=True):
        torch.testing.assert_close(several.norm, one.norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(several.amax, one.amax, rtol=1e-6, atol=0)
        assert several.clip_factor < 0.5
    return part.amax, norms[-1].norm


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_step_is_that_of_one_process(run_distributed, size, stochastic, sequence_parallel):
    results = run_distributed(step_both, size, stochastic, sequence_parallel)
    for amax, norm in results:
        assert torch.equal(amax, results[0][0])
        assert torch.equal(norm, results[0][1])


def step_with_a_fault(bad_rank):
    adam = optimizer(tensor_parallel(), stochastic=True)
    set_gradients(adam, 0)
    adam.step(1e-2)
    before = all_bytes(adam)
    set_gradients(adam, 1, fault_on=bad_rank)
    skipped = adam.step(1e-2).skip
    after = all_bytes(adam)
    return bool(skipped), all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_fault_on_one_rank_skips_the_step_on_all(run_distributed, bad_rank):
    assert run_distributed(step_with_a_fault, 2, bad_rank) == [(True, True)] * 2
