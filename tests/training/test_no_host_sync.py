"""A training step asks the device for no value: on the meta device, which has none, it runs whole.

There `.item()`, `.tolist()` and `bool()` raise, as does an operation that mixes tensors of both
devices (of one dimension or more). On a GPU either would stop the host in every step. Of several
ranks this process is one; what they would send each other goes nowhere.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fp8lm.batch import Batch, Documents
from fp8lm.comm import Handle, Wire, WireCounter, all_gather_scalars, max_over_group
from fp8lm.comm.dims import DENSE
from fp8lm.config import OptimizerConfig, PrecisionConfig
from fp8lm.gradient.buckets import GradientBuckets, ShardedReduction
from fp8lm.gradient.fp8_sum import AutoScaler, Fp8Sum
from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.gradient.reduction import Fp32ReduceScatter
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.layers.param import named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import NO_TP
from fp8lm.model import GPTModel
from fp8lm.model.objectives import LanguageModeling
from fp8lm.numerics import E4M3
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.parallel import TensorParallel
from fp8lm.parallel.distributed_optimizer import (
    ShardedParams,
    ZeroDataParallel,
    in_parts,
    tensors_of,
)
from fp8lm.parallel.param_buffer import ParamBuffer
from fp8lm.parallel.param_layout import assign_whole_tensors, shard_rows
from fp8lm.parallel.pipeline import NoPipeline
from fp8lm.training.step import train_step
from tests.model.tiny import BATCH, SEQUENCE, SHAPES, VOCABULARY, model_config

pytestmark = pytest.mark.slow

META = torch.device("meta")
STARTS = torch.tensor([[0] * 5 + [5] * 11, [0] * 16])
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def batch(*, apart=False):
    shape = (BATCH, SEQUENCE)
    return Batch(
        tokens=torch.zeros(shape, dtype=torch.int64, device=META),
        labels=torch.zeros(shape, dtype=torch.int64, device=META),
        loss_mask=torch.ones(shape, device=META),
        sample_ids=torch.zeros(BATCH, dtype=torch.int64, device=META),
        position_ids=torch.zeros(shape, dtype=torch.int64, device=META) if apart else None,
        documents=Documents.from_starts(STARTS).to(META) if apart else None,
    )


KERNELS = HopperKernels()
BACKENDS = [KERNELS]
if find_spec("triton"):
    from fp8lm.kernels.triton.backend import TritonKernels

    BACKENDS.append(TritonKernels())


def model(shape, precision, tp=NO_TP, kernels=KERNELS):
    recipe = Recipe.from_config(precision, kernels, META, tp)
    config = model_config(**SHAPES[shape], **DROPOUT)
    return GPTModel(config, VOCABULARY, recipe)


def optimizer(weights, precision, sharding=None, kernels=KERNELS):
    states = StatePrecision.from_config(precision)
    adam = AdamW(weights, OptimizerConfig(lr=1e-3), states, kernels, seed=1, sharding=sharding)
    for name, weight in weights.items():
        adam.initialize(name, torch.zeros(weight.spec.shape))
    return adam


def check_two_steps(gpt, adam, data_parallel=None, kernels=KERNELS):
    objective = LanguageModeling(VOCABULARY - 3, gpt.tp, kernels)
    for _ in range(2):  # weights of the first may still travel in the second
        step = train_step(gpt, adam, objective, [batch(), batch()], 1e-3, data_parallel)
    if data_parallel is not None:
        data_parallel.finish_param_sync()
    adam.share_amax()
    told = step.loss, step.grad_norm, step.skipped, step.stop, adam.params_norm()
    assert {x.device for x in told} == {META}


@pytest.mark.parametrize("shape", ["gpt", "llama"])
@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o2", "o3", "o3_long", "o4"])
@pytest.mark.parametrize("kernels", BACKENDS, ids=lambda kernels: type(kernels).__name__)
def test_steps_and_an_evaluation(preset, shape, kernels):
    precision = PrecisionConfig(preset=preset)
    gpt = model(shape, precision, kernels=kernels)
    adam = optimizer(named_params(gpt), precision, kernels=kernels)
    check_two_steps(gpt, adam, kernels=kernels)
    objective = LanguageModeling(VOCABULARY - 3, kernels=kernels)
    (loss,) = NoPipeline(gpt.forward_step).evaluate([batch()], objective)
    assert loss.device == META


@pytest.mark.parametrize("kernels", BACKENDS, ids=lambda kernels: type(kernels).__name__)
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_documents_apart(recompute, kernels):
    recipe = Recipe.from_config(PrecisionConfig(preset="o3"), kernels, META)
    gpt = GPTModel(model_config(**SHAPES["llama"]), VOCABULARY, recipe, recompute)
    objective = LanguageModeling(VOCABULARY - 3, kernels=kernels)
    data = batch(apart=True)
    (loss,) = NoPipeline(gpt.forward_step).train([data, data], objective, lambda: None)
    assert loss.device == META


@pytest.fixture
def ranks():
    """This process as rank 5 of 8: shard 1 of 2, replica 2 of 4, on nodes of two replicas."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    lists = {"tp": [4, 5], "dp": [1, 3, 5, 7], "node": [5, 7], "across": [1, 5]}
    try:
        yield {name: dist.new_group(members) for name, members in lists.items()}
    finally:
        dist.destroy_process_group()


def summed_by_nccl(codes, fmt, group, wire):
    return Handle.done(codes[group.rank()])


def reduction(kind, groups, wire, weights):
    if kind == "two hops":
        return HierarchicalReduceScatter(
            groups["dp"], groups["node"], groups["across"], wire, KERNELS
        )
    if kind == "fp8_sum":
        names = [name for name, weight in weights.items() if weight.spec.grad_format == E4M3]
        scaling = AutoScaler(names, groups["dp"].size(), "automatic", META)
        return Fp8Sum(groups["dp"], dist.group.WORLD, wire, KERNELS, scaling, summed_by_nccl)
    return Fp32ReduceScatter(groups["dp"], wire, KERNELS)


@pytest.mark.parametrize("preset", ["bf16", "o3"])
@pytest.mark.parametrize("place", [assign_whole_tensors, shard_rows])
@pytest.mark.parametrize("kind", ["fp32_accumulate", "two hops", "fp8_sum"])
def test_steps_of_one_rank_of_several(kind, place, preset, ranks):
    counter, group = WireCounter(), ranks["dp"]
    tp = TensorParallel(
        group=ranks["tp"],
        sequence_parallel=True,
        gather_wire=Wire("tp_gather", "fp8", counter),
        reduce_wire=Wire("tp_reduce", "fp8", counter),
        kernels=KERNELS,
    )
    precision = PrecisionConfig(preset=preset)
    gpt = model("gpt", precision, tp)
    weights, grads = named_params(gpt), Wire("grads", "fp8", counter)
    parts = in_parts(weights, 3000)
    owners = place([tensors_of(part) for part in parts], group.size())
    rows = ShardedParams(parts, owners).rows
    reductions = {DENSE: ShardedReduction(reduction(kind, ranks, grads, weights), rows)}
    buckets = GradientBuckets(weights, reductions, 2000, overlap=True)
    params = Wire("params", "fp8", counter)
    buffers = [
        ParamBuffer(*both, group, params, KERNELS) for both in zip(parts, owners, strict=True)
    ]
    data_parallel = ZeroDataParallel(weights, buffers, buckets)
    data_parallel.overlap_gather(gpt)
    sharding = OptimizerSharding.build(
        weights,
        tp,
        local_shards=data_parallel.local_shards,
        gather=lambda values: all_gather_scalars(values, dist.group.WORLD, grads),
        max=lambda values: max_over_group(values, dist.group.WORLD, grads).wait(),
    )
    adam = optimizer(weights, precision, sharding)
    check_two_steps(gpt, adam, data_parallel)
    assert all(count for wire, count in counter.sent.items() if wire != "pipeline")
