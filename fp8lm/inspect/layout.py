"""Which rank of a job holds what, and the bytes of state that it will hold.

The model's parts, the owners of their rows and the optimizer's states are made by the code that
makes them in a run, on PyTorch's meta device: shapes and dtypes without memory. All shards of a
layer are alike, so one tensor-parallel rank stands for all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fp8lm.comm.groups import check_sizes, rank_lists
from fp8lm.config import Config
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.edge import Partition
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.split import Split
from fp8lm.layers.weight import Weight, named_weights
from fp8lm.model.gpt import ModelPart
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.training.build import gpt, table_rows
from fp8lm.training.layout import model_parts, owned_parts, rows_by_rank

META = torch.device("meta")
KINDS = ("weights", "grads", "master", "exp_avg", "exp_avg_sq")
Bytes = dict[str, int]


class MetaKernels(ReferenceKernels):
    """A tensor at a time: there is no memory whose cache blocks would have to fit."""

    block_elements = sys.maxsize


class Shard(Partition):
    """The first of `size` tensor-parallel ranks, without a group to talk to."""

    def __init__(self, size: int, sequence_parallel: bool = False) -> None:
        self.size, self.sequence_parallel = size, sequence_parallel

    def split(self, dim: int, parts: int = 1) -> Split:
        """See `Partition`."""
        return Split(dim, parts, 0, self.size)


@dataclass(frozen=True)
class RankLayout:
    """One process: where it runs, its coordinates, its part of the model, its bytes by kind."""

    rank: int
    node: int
    local_rank: int
    tensor: int
    replica: int
    stage: int
    parts: tuple[ModelPart, ...]
    state_bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Of weights, gradients and optimizer states."""
        return sum(self.state_bytes.values())


@dataclass(frozen=True)
class JobLayout:
    """All processes of a job, and the parameters of the whole model."""

    ranks: tuple[RankLayout, ...]
    parameters: int
    tensor_size: int
    replicas: int
    stages: int


def job_layout(config: Config, num_ids: int, world_size: int, node_size: int) -> JobLayout:
    """The layout of `world_size` processes, `node_size` on each machine.

    `num_ids` is the size of the tokenizer's vocabulary. InputError if the processes do not divide.
    """
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_sizes(world_size, tensor, stages)
    replicas = world_size // (tensor * stages)
    groups = rank_lists(tensor, replicas, stages)
    held = [stage_bytes(config, num_ids, stage, replicas) for stage in range(stages)]
    ranks = []
    for rank in range(world_size):
        shard, replica, stage = (_index_in(groups[kind], rank) for kind in ("tp", "dp", "pp"))
        ranks.append(
            RankLayout(
                rank,
                *divmod(rank, node_size),
                shard,
                replica,
                stage,
                tuple(model_parts(config, stage)),
                held[stage][replica],
            )
        )
    return JobLayout(tuple(ranks), count_parameters(config, num_ids), tensor, replicas, stages)


def stage_bytes(config: Config, num_ids: int, stage: int, replicas: int) -> list[Bytes]:
    """Bytes by kind of a rank of `stage`, for each of `replicas` data-parallel ranks."""
    weights = stage_weights(config, num_ids, stage)
    optimizer = _optimizer(config, weights)
    everywhere = {
        "weights": sum(weight.compute.nbytes for weight in weights.values()),
        "grads": sum(weight.grad.value.nbytes for weight in weights.values()),
    }
    whole = {name: (0, weight.spec.local_shape[0]) for name, weight in weights.items()}
    rows = [whole] * replicas
    if config.parallel.use_distributed_optimizer and replicas > 1:
        rows = rows_by_rank([owner for _, owner in owned_parts(config, weights, replicas)])
    return [everywhere | _states_of(optimizer, own) for own in rows]


def stage_weights(config: Config, num_ids: int, stage: int) -> dict[str, Weight]:
    """The weights of a rank of `stage`, on the meta device."""
    parallel = config.parallel
    partition = Shard(parallel.tensor_model_parallel_size, parallel.sequence_parallel)
    recipe = Recipe.from_config(config.precision, MetaKernels(), META, partition)
    rows = table_rows(config, num_ids)
    chunks = [gpt(config, rows, num_ids, recipe, part) for part in model_parts(config, stage)]
    return {name: weight for chunk in chunks for name, weight in named_weights(chunk).items()}


def count_parameters(config: Config, num_ids: int) -> int:
    """Parameters of the whole model, padding of the vocabulary included."""
    whole = config.model_copy(update={"parallel": type(config.parallel)()})
    weights = stage_weights(whole, table_rows(config, num_ids), 0)
    return sum(weight.spec.numel for weight in weights.values())


def _optimizer(config: Config, weights: dict[str, Weight]) -> AdamW:
    """The states of all rows."""
    optimizer = AdamW(
        weights,
        config.optimizer,
        StatePrecision.from_config(config.precision),
        MetaKernels(),
        seed=0,
    )
    for name, weight in weights.items():
        optimizer.initialize(name, torch.empty(weight.spec.shape, device=META))
    return optimizer


def _states_of(optimizer: AdamW, rows: Mapping[str, tuple[int, int]]) -> Bytes:
    """Bytes of the states of `rows`: the same as whole ones, but for fewer rows of payload."""
    held = dict.fromkeys(KINDS[2:], 0)
    for name, (start, stop) in rows.items():
        state = optimizer.states[name]
        for kind in held:
            tensor = getattr(state, kind)
            if kind == "master" and not state.owns_master:
                continue
            held[kind] += tensor.rows(start, stop).nbytes
    return held


def _index_in(groups: list[list[int]], rank: int) -> int:
    return next(ranks.index(rank) for ranks in groups if rank in ranks)
