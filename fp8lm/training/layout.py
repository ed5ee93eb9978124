"""How config section `parallel` divides a model, its states and its work over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter, all_gather_scalars, reduce_scatter_fp8, sums_fp8
from fp8lm.comm.groups import (
    ProcessGroups,
    node_groups,
    processes_per_node,
    stage_groups,
    tensor_parallel_neighbours,
)
from fp8lm.config import Config
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.gradient.fp8_sum import Fp8Sum, Scaling
from fp8lm.gradient.hierarchical import HierarchicalAccumulate
from fp8lm.gradient.reduction import Fp32Accumulate, GradientReduction
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.edge import ALONE, Partition
from fp8lm.layers.weight import Weight, named_weights
from fp8lm.model.gpt import GPTModel
from fp8lm.numerics import E4M3
from fp8lm.optim.clipping import Exchange
from fp8lm.parallel import TensorParallel
from fp8lm.parallel.ownership import Ownership, row_blocks, whole_tensors
from fp8lm.parallel.pipeline import Pipeline
from fp8lm.parallel.query_groups import SharedQueryGroup
from fp8lm.parallel.replicas import (
    OneReplica,
    PlainReplicas,
    ZeroReplicas,
    in_parts,
    tensors_of,
)
from fp8lm.parallel.weight_slabs import WeightSlabs
from fp8lm.training.pipelining import build_exchange, build_pipeline, counted_elsewhere


def build_partition(
    config: Config, groups: ProcessGroups, kernels: ReferenceKernels, counter: WireCounter
) -> Partition:
    """How config section `parallel` divides layers over the ranks of `groups`."""
    parallel, wire = config.parallel, config.precision.wire
    if parallel.tensor_model_parallel_size == 1:
        return ALONE
    gather_wire = Wire("tp_gather", wire.gather, counter)
    reduce_wire = Wire("tp_reduce", wire.reduce, counter)
    sharing = parallel.tensor_model_parallel_size // config.model.num_query_groups
    query_group = None
    if sharing > 1:
        neighbours = tensor_parallel_neighbours(groups, sharing)
        query_group = SharedQueryGroup(neighbours, gather_wire, reduce_wire, kernels)
    return TensorParallel(
        group=groups.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        gather_wire=gather_wire,
        reduce_wire=reduce_wire,
        kernels=kernels,
        query_group=query_group,
    )


@dataclass(frozen=True)
class Links:
    """What joins this rank's `weights`, by Megatron name, to the ranks that step with it.

    `exchange`, `peers` and `counted_elsewhere` are those of `AdamW`.
    """

    weights: dict[str, Weight]
    replicas: OneReplica
    pipeline: Pipeline | None
    exchange: Exchange
    peers: Sequence[int] | None
    counted_elsewhere: frozenset[str]


def link(
    config: Config,
    groups: ProcessGroups,
    chunks: list[GPTModel],
    kernels: ReferenceKernels,
    counter: WireCounter,
    device: torch.device,
) -> Links:
    """Join `chunks`, this rank's parts of the model, to those of the other ranks; a collective."""
    weights = {name: weight for chunk in chunks for name, weight in named_weights(chunk).items()}
    scalars = Wire("grads", "fp32", counter)
    pipeline, peers, alike = None, None, groups.world
    exchange: Exchange = partial(all_gather_scalars, group=groups.world, wire=scalars)
    if groups.pipeline_parallel.size() > 1:
        stages = stage_groups(groups)
        alike = stages.alike
        exchange = build_exchange(groups, stages, scalars, len(weights))
        peers = exchange.peers
        pipeline = build_pipeline(config, chunks, stages, weights, kernels, counter, device)
    replicas = build_replicas(config, groups, kernels, counter, alike, weights)
    if config.parallel.overlap_param_gather and isinstance(replicas, ZeroReplicas):
        for chunk in chunks:
            replicas.overlap_gather(chunk)
    elsewhere = counted_elsewhere(config, groups.pipeline_parallel.rank())
    return Links(weights, replicas, pipeline, exchange, peers, elsewhere)


def build_replicas(
    config: Config,
    groups: ProcessGroups,
    kernels: ReferenceKernels,
    counter: WireCounter,
    alike: dist.ProcessGroup,
    weights: dict[str, Weight],
) -> OneReplica:
    """How config section `parallel` divides gradients and states over `groups.data_parallel`."""
    parallel, wire, group = config.parallel, config.precision.wire, groups.data_parallel
    if group.size() == 1:
        return OneReplica(weights)
    parts, owners = owned_parts(config, weights, group.size())
    rows = rows_by_rank(owners)
    buckets = GradientBuckets(
        weights,
        rows,
        build_reduction(
            config, groups, kernels, Wire("grads", wire.grads, counter), alike, weights
        ),
        parallel.ddp_bucket_size,
        overlap=parallel.overlap_grad_reduce,
    )
    if not parallel.use_distributed_optimizer:
        return PlainReplicas(weights, buckets, group.rank())
    # Weights that are not FP8 travel as they are stored.
    sent = wire.params if config.precision.params_dtype == "fp8_e4m3" else "fp8"
    params = Wire("params", sent, counter)
    slabs = [
        WeightSlabs(part, ownership, group, params, kernels)
        for part, ownership in zip(parts, owners, strict=True)
    ]
    return ZeroReplicas(weights, slabs, buckets)


def owned_parts(
    config: Config, weights: dict[str, Weight], replicas: int
) -> tuple[list[dict[str, Weight]], list[Ownership]]:
    """`weights` in the parts that travel apart, and who of `replicas` ranks owns what of each."""
    parallel = config.parallel
    place = {"tensor": whole_tensors, "even": row_blocks}[parallel.partition]
    # Forward can only begin with the first weights if these travel apart from the last.
    size = parallel.ddp_bucket_size if parallel.overlap_param_gather else None
    parts = in_parts(weights, size)
    return parts, place([tensors_of(part) for part in parts], replicas)


def rows_by_rank(parts: list[Ownership]) -> list[dict[str, tuple[int, int]]]:
    """The rows of every weight that each rank owns."""
    return [
        {name: span for ownership in parts for name, span in ownership.rows[rank].items()}
        for rank in range(parts[0].num_ranks)
    ]


def build_reduction(
    config: Config,
    groups: ProcessGroups,
    kernels: ReferenceKernels,
    wire: Wire,
    alike: dist.ProcessGroup,
    weights: dict[str, Weight],
) -> GradientReduction:
    """How `precision.grad_reduce` adds gradients over `groups.data_parallel`.

    `alike` are all ranks that hold parts of the same weights.
    """
    kind, group = config.precision.grad_reduce, groups.data_parallel
    if kind == "fp32_accumulate":
        # Each rank knows its own machine only: what they do has to follow from what all know.
        given = config.parallel.node_size
        size = given or processes_per_node()
        nodes = None if size is None else node_groups(groups, size, given=given is not None)
        if nodes is None:
            return Fp32Accumulate(group, wire, kernels)
        return HierarchicalAccumulate(group, nodes.node, nodes.across, wire, kernels)
    names = [name for name, weight in weights.items() if weight.spec.grad_format == E4M3]
    policy = {"fp8_sum": "automatic"}.get(kind, kind.removeprefix("fp8_"))
    device = next(iter(weights.values())).compute.device
    scaling = Scaling(names, group.size(), policy, device)
    native = reduce_scatter_fp8 if sums_fp8(group, device) else None
    return Fp8Sum(group, alike, wire, kernels, scaling, native)
