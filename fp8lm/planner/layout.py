"""What each rank will hold and how many bytes, computed without starting a process.

Models are built on the meta device, so that nothing is allocated; the modules, owners and formats
are those that a run builds. The bytes are those that a
running rank reports as `state_bytes/*`, scales included (`operands` as on a GPU).

Ranks of one stage hold parts of the same shapes, whatever their number in the tensor-parallel
group; with ZeRO their states depend on their number among the replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fp8lm.comm.dims import DENSE, REPLICA_AXIS, ParallelDims
from fp8lm.config import Config
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.layers.param import Param, QuantizedParam, by_group, named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.shard_spec import LocalShards, Rows, ShardSpec
from fp8lm.layers.tp_context import TPContext
from fp8lm.model.decoder import StageSpec
from fp8lm.optim import StatePrecision
from fp8lm.parallel.distributed_optimizer import shard_params
from fp8lm.parallel.parallelize import stage_specs
from fp8lm.training.builders import build_model, model_vocab_size
from fp8lm.training.reference import reference_recipe

STATES = ("master", "exp_avg", "exp_avg_sq")
KINDS = ("weights", "grads", "operands", *STATES, "reference")


@dataclass(frozen=True)
class RankPlacement:
    """Where a rank runs, and its numbers in the tensor-, data- and pipeline-parallel groups."""

    rank: int
    node: int
    local_rank: int
    tensor: int
    data: int
    stage: int


@dataclass(frozen=True)
class Stage:
    """What every rank of a pipeline stage holds: parts of the model, and bytes by replica.

    A replica gets the gradients of its `rows`, whose weights have `shards` bytes.
    """

    chunks: tuple[StageSpec, ...]
    weights: dict[str, Param]
    state: tuple[Mapping[str, int], ...]
    rows: tuple[LocalShards, ...]
    shards: tuple[int, ...]

    @cached_property
    def totals(self) -> list[int]:
        """Bytes of all kinds together, by replica."""
        return [sum(kinds.values()) for kinds in self.state]


@dataclass(frozen=True)
class Layout:
    """All ranks and all stages of a run."""

    config: Config
    dims: ParallelDims
    node_size: int
    stages: tuple[Stage, ...]

    @cached_property
    def ranks(self) -> tuple[RankPlacement, ...]:
        """Where every rank is, in ascending order."""
        dims = self.dims
        axes = [(dims.stride(axis), dims.size(axis)) for axis in ("tp", "dp", "pp")]
        return tuple(
            RankPlacement(
                rank,
                *divmod(rank, self.node_size),
                *(rank // stride % size for stride, size in axes),
            )
            for rank in range(dims.world_size)
        )

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return -(-self.dims.world_size // self.node_size)

    @property
    def num_parameters(self) -> int:
        """Elements of all logical tensors; a table that two stages hold counts once."""
        specs = {
            name: weight.spec for stage in self.stages for name, weight in stage.weights.items()
        }
        return sum(math.prod(spec.shape) for spec in specs.values())

    def holds(self, kind: str) -> bool:
        """Whether any rank has bytes of `kind`."""
        return any(kinds[kind] for stage in self.stages for kinds in stage.state)

    def state(self, place: RankPlacement) -> Mapping[str, int]:
        """Bytes that the rank at `place` holds, by kind."""
        return self.stages[place.stage].state[place.data]

    @property
    def imbalance(self) -> float:
        """Bytes of optimizer states on the fullest replica over the mean, in the worst stage."""
        owned = [[sum(s[kind] for kind in STATES) for s in stage.state] for stage in self.stages]
        return max(max(loads) * len(loads) / sum(loads) for loads in owned)

    @cached_property
    def totals(self) -> list[int]:
        """Bytes that each rank holds."""
        return [self.stages[place.stage].totals[place.data] for place in self.ranks]


def plan_layout(config: Config, num_ids: int, world_size: int, node_size: int) -> Layout:
    """The layout of `config` on `world_size` processes, `node_size` a machine.

    `num_ids` is the size of the tokenizer's vocabulary. InputError if the processes do not divide
    into replicas.
    """
    dims = ParallelDims.from_config(config.parallel, world_size)
    rows = model_vocab_size(config, num_ids)
    made = tuple(plan_stage(config, dims, rows, stage) for stage in range(dims.pp))
    return Layout(config, dims, node_size, made)


class ShapesOnly(TPContext):
    """The first of `size` tensor-parallel ranks, without a group to talk to."""

    def __init__(self, size: int, sequence_parallel: bool = False) -> None:
        self._size, self.sequence_parallel = size, sequence_parallel

    @property
    def size(self) -> int:
        """See `TPContext`."""
        return self._size

    def shard(self, dim: int, num_sections: int = 1) -> ShardSpec:
        """See `TPContext`."""
        return ShardSpec(dim, num_sections, 0, self.size)


def plan_stage(config: Config, dims: ParallelDims, rows: int, stage: int) -> Stage:
    """What each replica holds of stage number `stage`.

    `rows` are those of the word table, padding included.
    """
    parallel = config.parallel
    tp = ShapesOnly(parallel.tensor_model_parallel_size, parallel.sequence_parallel)
    recipe = Recipe.from_config(config.precision, HopperKernels(), torch.device("meta"), tp)
    specs = stage_specs(config, stage)
    chunks = [build_model(config, rows, recipe, part) for part in specs]
    weights = {name: weight for chunk in chunks for name, weight in named_params(chunk).items()}
    formats = StatePrecision.from_config(config.precision)
    owners, shards, padding = owners_of(config, dims, weights)
    owned = owners
    if not _is_sharded(config, dims):
        owned, padding = local_shards_of(config, dims, weights)
    held = _held_bytes(weights, padding) | {"reference": reference_bytes(config, tp, rows, specs)}
    state = tuple(held | _states_bytes(weights, rows_of, formats) for rows_of in owned)
    return Stage(tuple(specs), weights, state, tuple(owners), tuple(shards))


def reference_bytes(config: Config, tp: TPContext, rows: int, specs: Sequence[StageSpec]) -> int:
    """Bytes of the parts `specs` of preference training's reference model; 0 without one."""
    if config.train.objective != "dpo" or config.tuning.reference_logprobs is not None:
        return 0
    recipe = reference_recipe(config, HopperKernels(), torch.device("meta"), tp)
    chunks = [build_model(config, rows, recipe, part) for part in specs]
    weights = (weight for chunk in chunks for weight in named_params(chunk).values())
    return sum(weight.model_param.nbytes for weight in weights)


def local_shards_of(
    config: Config, dims: ParallelDims, weights: dict[str, Param]
) -> tuple[list[dict[str, Rows]], int]:
    """The rows of each weight whose states each replica holds; bytes that pad the weights."""
    if not _is_sharded(config, dims):
        everything = {name: (0, weight.spec.local_shape[0]) for name, weight in weights.items()}
        return [everything] * dims.dp, 0
    rows, _, padding = owners_of(config, dims, weights)
    return rows, padding


def _is_sharded(config: Config, dims: ParallelDims) -> bool:
    return dims.dp > 1 and config.parallel.use_distributed_optimizer


def owners_of(
    config: Config, dims: ParallelDims, weights: dict[str, Param]
) -> tuple[list[dict[str, Rows]], list[int], int]:
    """The rows whose gradients each replica gets, the bytes of their weights, and of all padding.

    Replicas of experts share those of one owner, so that the bytes of all may count some twice.
    """
    rows: list[dict[str, Rows]] = [{} for _ in range(dims.dp)]
    shards = [0] * dims.dp
    padding = -sum(weight.model_param.payload.nbytes for weight in weights.values())
    for group, params in by_group(weights).items():
        axis = REPLICA_AXIS[group]
        sharded = shard_params(config.parallel, params, dims.size(axis))
        padding += sharded.nbytes
        sizes = [sum(each) for each in zip(*(p.shard_bytes for p in sharded.layouts), strict=True)]
        apart, stride, size = dims.stride(REPLICA_AXIS[DENSE]), dims.stride(axis), dims.size(axis)
        for replica, own in enumerate(rows):
            owner = replica * apart // stride % size
            own |= sharded.rows[owner]
            shards[replica] += sizes[owner]
    return rows, shards, padding


def _held_bytes(weights: Mapping[str, Param], padding: int) -> dict[str, int]:
    return {
        "weights": sum(weight.model_param.nbytes for weight in weights.values()) + padding,
        "grads": sum(weight.main_grad.value.nbytes for weight in weights.values()),
        "operands": sum(w.operand_bytes for w in weights.values() if isinstance(w, QuantizedParam)),
    }


def _states_bytes(
    weights: Mapping[str, Param], rows: LocalShards, formats: StatePrecision
) -> dict[str, int]:
    sizes = dict.fromkeys(STATES, 0)
    for name, (first, last) in rows.items():
        spec = weights[name].spec
        elements = (last - first) * math.prod(spec.local_shape[1:])
        kept = formats.own_master(spec.format), formats.exp_avg, formats.exp_avg_sq
        for kind, fmt in zip(sizes, kept, strict=True):
            if fmt is not None:
                sizes[kind] += elements * fmt.bytes + 4 * fmt.scaled  # and an fp32 scale
    return sizes
