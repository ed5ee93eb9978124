"""How config section `parallel` divides a model, its states and its work over processes."""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.groups import ProcessGroups, StageGroups, node_groups
from fp8lm.comm.launch import Launch
from fp8lm.comm.stages import StageWire
from fp8lm.config import Config
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.gradient.fp8_sum import Fp8Sum, Scaling
from fp8lm.gradient.hierarchical import HierarchicalAccumulate
from fp8lm.gradient.reduction import Fp32Accumulate, GradientReduction
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.deferred import DeferredGradients
from fp8lm.layers.edge import ALONE, Partition
from fp8lm.layers.weight import GemmWeight, Weight
from fp8lm.model.gpt import GPTModel, ModelPart
from fp8lm.numerics import E4M3
from fp8lm.parallel import TensorParallel
from fp8lm.parallel.ownership import Ownership, row_blocks, whole_tensors
from fp8lm.parallel.pipeline import Batch, Pipeline
from fp8lm.parallel.replicas import (
    OneReplica,
    PlainReplicas,
    ZeroReplicas,
    in_parts,
    tensors_of,
)
from fp8lm.parallel.stages import (
    WORD_TABLE,
    StepExchange,
    TiedEnds,
    layer_ranges,
    schedule_maker,
)
from fp8lm.parallel.weight_slabs import WeightSlabs


def build_partition(
    config: Config, groups: ProcessGroups, kernels: ReferenceKernels, counter: WireCounter
) -> Partition:
    """How config section `parallel` divides layers over the ranks of `groups`."""
    parallel, wire = config.parallel, config.precision.wire
    if parallel.tensor_model_parallel_size == 1:
        return ALONE
    return TensorParallel(
        group=groups.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        gather_wire=Wire("tp_gather", wire.gather, counter),
        reduce_wire=Wire("tp_reduce", wire.reduce, counter),
        kernels=kernels,
    )


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
    parts = owned_parts(config, weights, group.size())
    rows = rows_by_rank([ownership for _, ownership in parts])
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
    slabs = [WeightSlabs(part, ownership, group, params, kernels) for part, ownership in parts]
    return ZeroReplicas(weights, slabs, buckets)


def owned_parts(
    config: Config, weights: dict[str, Weight], replicas: int
) -> list[tuple[dict[str, Weight], Ownership]]:
    """`weights` in the parts that travel apart, and who of `replicas` ranks owns what of each."""
    parallel = config.parallel
    place = {"tensor": whole_tensors, "even": row_blocks}[parallel.partition]
    # Forward can only begin with the first weights if these travel apart from the last.
    size = parallel.ddp_bucket_size if parallel.overlap_param_gather else None
    return [(part, place(tensors_of(part), replicas)) for part in in_parts(weights, size)]


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
        launched = Launch.from_environment(os.environ)
        nodes = node_groups(groups, config.parallel.node_size or launched.local_world_size)
        if nodes is None:
            return Fp32Accumulate(group, wire, kernels)
        return HierarchicalAccumulate(group, nodes.node, nodes.across, wire, kernels)
    names = [name for name, weight in weights.items() if weight.spec.grad_format == E4M3]
    policy = {"fp8_sum": "automatic"}.get(kind, kind.removeprefix("fp8_"))
    device = next(iter(weights.values())).compute.device
    scaling = Scaling(names, group.size(), policy, device)
    return Fp8Sum(group, alike, wire, kernels, scaling)


def model_parts(config: Config, stage: int) -> list[ModelPart]:
    """What stage number `stage` holds of the model, a part per chunk."""
    parallel, layers = config.parallel, config.model.num_layers
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks(layers)
    ranges = layer_ranges(
        layers,
        stages,
        chunks,
        parallel.decoder_first_pipeline_num_layers,
        parallel.decoder_last_pipeline_num_layers,
    )
    last = stages * chunks - 1
    return [
        ModelPart(ranges[virtual], has_embedding=virtual == 0, has_head=virtual == last)
        for virtual in range(stage, stages * chunks, stages)
    ]


def counted_elsewhere(config: Config, stage: int) -> frozenset[str]:
    """Weights of this stage that the first stage has too, and counts."""
    stages = config.parallel.pipeline_model_parallel_size
    untied = config.model.untie_embeddings_and_output_weights
    last = stages > 1 and stage == stages - 1
    return frozenset({WORD_TABLE} if last and not untied else ())


def build_exchange(
    groups: ProcessGroups, stages: StageGroups, wire: Wire, num_weights: int
) -> StepExchange:
    """The step's exchange between stages of different weights; a collective."""
    counts: list[int] = [0] * groups.world.size()
    dist.all_gather_object(counts, num_weights)
    peers = tuple(dist.get_process_group_ranks(stages.alike))
    return StepExchange(groups.world, peers, 3 + 4 * max(counts), wire)


def build_pipeline(
    config: Config,
    chunks: list[GPTModel],
    groups: StageGroups,
    weights: dict[str, Weight],
    kernels: ReferenceKernels,
    counter: WireCounter,
    device: torch.device,
) -> Pipeline:
    """The executor of this stage's `chunks`."""
    parallel, model, train = config.parallel, config.model, config.train
    stages = parallel.pipeline_model_parallel_size
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    shape = (model.seq_length // split, train.micro_batch_size, model.hidden_size)
    wire = Wire("pipeline", config.precision.wire.pipeline, counter)
    deferred = DeferredGradients()
    for weight in weights.values():
        if isinstance(weight, GemmWeight):
            weight.defer_gradient(deferred)
    tied = None
    ends = groups.forward.rank() in (0, stages - 1)
    if ends and not model.untie_embeddings_and_output_weights:
        fp32 = Wire("pipeline", "fp32", counter)
        tied = TiedEnds(groups.ends, fp32, kernels, weights[WORD_TABLE])
    return Pipeline(
        [partial(run_chunk, chunk) for chunk in chunks],
        schedule_maker(parallel.pipeline_schedule, stages, len(chunks)),
        groups,
        StageWire(shape, chunks[0].dtype, wire, kernels),
        device,
        deferred,
        tied,
    )


def run_chunk(model: GPTModel, h_SBH: Tensor | None, batch: Batch) -> Tensor:
    """Hidden states, or the loss of the model's last part (see `Pipeline`)."""
    samples = batch.get("samples")
    if model.part.has_head:
        return model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], samples, h_SBH)
    return model(batch["tokens"], samples, h_SBH)
