"""A model of which some layers are experts, on one process or on expert-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fp8lm.comm import WireCounter
from fp8lm.comm.dims import DENSE, EXPERT, ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.layers.linear import Linear
from fp8lm.layers.param import ParamSpec, named_params, vector_spec
from fp8lm.layers.tp_context import NO_TP
from fp8lm.model.init import normal_init
from fp8lm.model.objectives import Objective
from fp8lm.numerics import BF16
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.parallelize import parallelize
from fp8lm.parallel.pipeline import NoPipeline
from fp8lm.planner.layout import local_shards_of
from fp8lm.training.build import build_optimizer
from fp8lm.training.step import zero_gradients
from tests.parallel.ranks import CPU, KERNELS, random, recipe

TOKENS, FEATURES, EXPERTS = 16, 32, 4


class TinyExperts(nn.Module):
    """A dense layer, one of the experts `numbers` that this rank has, a dense layer.

    A micro-batch names its expert, which has to be here: no token goes to another rank.
    """

    tp = NO_TP

    def __init__(self, numbers, precision):
        super().__init__()
        formats = recipe(NO_TP, **precision)
        self.first = layer(formats, DENSE, 0.2)
        # Their amaxes are far apart, so that a maximum over another expert's ranks shows.
        experts = {str(n): layer(formats, EXPERT, 0.05 * 4.0**n) for n in numbers}
        self.experts = nn.ModuleDict(experts)
        self.last = layer(formats, DENSE, 0.2)

    def forward_step(self, h, batch):
        """Hidden states of the micro-batch."""
        return self.last(self.experts[str(batch["expert"])](self.first(batch["x"])))


class MeanProduct(Objective):
    """An objective."""

    def loss(self, output, batch):
        """Mean of the outputs, each weighted by its target."""
        return (output * batch["target"]).float().mean()


def layer(formats, group, std):
    shape = (FEATURES, FEATURES)
    spec = ParamSpec(shape, normal_init(std), formats.weight, formats.weight_grad, group=group)
    return Linear(spec, formats, bias=vector_spec(FEATURES, 0.5, BF16, group=group))


def batch(step, replica, ep):
    """What replica number `replica` of a job with `ep` expert-parallel ranks trains on."""
    per_rank = EXPERTS // ep
    expert = replica % ep * per_rank + (step + replica // ep) % per_rank
    seed = 100 * step + 10 * replica
    shape = (TOKENS, FEATURES)
    return {
        "expert": expert,
        "x": random(*shape, seed=seed, dtype=torch.bfloat16),
        "target": random(*shape, seed=seed + 1, dtype=torch.bfloat16),
    }


def train(config, run, batches):
    """Steps of `run` (weights, data_parallel, pipeline, sharding); what came of them, by name."""
    weights, data_parallel, pipeline, sharding = run
    adam = build_optimizer(config, weights, KERNELS, sharding)
    steps = []
    for microbatches in batches:
        zero_gradients(weights)
        data_parallel.finish_param_sync()
        pipeline.train(microbatches, MeanProduct(), data_parallel.enable_grad_sync)
        gradients = data_parallel.reduce()
        norm = adam.step(1e-2, gradients)
        data_parallel.start_param_sync(norm.skip)
        values = {
            name: KERNELS.dequantize(gradient).clone() for name, gradient in gradients.items()
        }
        amaxes = dict(zip(weights, norm.amax.tolist(), strict=True))
        steps.append((values, amaxes, norm.norm.item(), norm.clip_factor.item(), bool(norm.skip)))
    data_parallel.finish_param_sync()
    adam.share_amax()
    return steps, state_of(adam), adam.params_norm().item()


def state_of(adam):
    """Weights, states and amaxes, by name."""
    amaxes = zip(adam.weights, adam.amax.unbind(), strict=True)
    tensors = {f"amax.{name}": amax.clone() for name, amax in amaxes}
    for name, weight in adam.weights.items():
        states = adam.states[name].stored if name in adam.states else ()
        for kind, tensor in enumerate((weight.model_param, *states)):
            tensors[f"{kind}.{name}.payload"] = tensor.payload.clone()
            tensors[f"{kind}.{name}.scale"] = tensor.scale.clone()
    return tensors


def precision_of(config):
    return config.precision.model_dump(exclude={"wire"})


def on_one_process(config, ep, replicas, num_steps):
    """All experts here, all micro-batches one after the other."""
    model = TinyExperts(range(EXPERTS), precision_of(config))
    weights = named_params(model)
    run = (
        weights,
        NoDataParallel(weights),
        NoPipeline(model.forward_step),
        OptimizerSharding.build(weights),
    )
    batches = [[batch(step, r, ep) for r in range(replicas)] for step in range(num_steps)]
    return train(config, run, batches)


def on_ranks(config, ep, num_steps, poisoned=None):
    """This rank's rows, and what `train` says; `poisoned` (rank, step) has a NaN in its input."""
    dims = ParallelDims.divide(dist.get_world_size(), ep=ep)
    rank, per_rank = dist.get_rank(), EXPERTS // ep
    first = dims.coordinate(rank, "ep") * per_rank
    with model_parallel_groups(dims) as groups:
        model = TinyExperts(range(first, first + per_rank), precision_of(config))
        made = parallelize(config, groups, [model], KERNELS, WireCounter(), CPU)
        batches = [[batch(step, rank, ep)] for step in range(num_steps)]
        if poisoned is not None and poisoned[0] == rank:
            batches[poisoned[1]][0]["x"][0, 0] = float("nan")
        run = made.weights, made.data_parallel, made.pipeline, made.sharding
        planned, padding = local_shards_of(config, dims, made.weights)
        assert planned[dims.coordinate(rank, "dp")] == made.data_parallel.local_shards
        assert padding == made.data_parallel.padding
        return made.data_parallel.local_shards, *train(config, run, batches)
