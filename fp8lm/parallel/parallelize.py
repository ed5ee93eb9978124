"""Applies config section `parallel` to a model: tensor, data and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8lm.comm import (
    Wire,
    WireCounter,
    all_gather_scalars,
)
from fp8lm.comm.amax import max_over_group
from fp8lm.comm.dims import DENSE
from fp8lm.comm.groups import (
    PipelineGroups,
    ProcessGroups,
    build_param_groups,
    pipeline_groups,
    tensor_parallel_neighbours,
)
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.config import Config
from fp8lm.kernels import Kernels
from fp8lm.kernels.cuda_graph import GraphCapture
from fp8lm.layers.amax_history import AmaxHistories
from fp8lm.layers.param import Param, QuantizedParam, named_params, trainable
from fp8lm.layers.quantizer import quantizers_of
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.model.decoder import StageSpec
from fp8lm.model.gpt import GPTModel
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.parallel.build_data_parallel import build_data_parallel, max_by_group
from fp8lm.parallel.cuda_graphs import GraphedMicrobatches, reduces_in_backward
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.distributed_optimizer import ZeroDataParallel
from fp8lm.parallel.pipeline import Executor, NoPipeline, Pipeline
from fp8lm.parallel.query_groups import SharedQueryGroup
from fp8lm.parallel.stages import WORD_TABLE, TiedEmbeddingSync, layer_ranges, schedule_maker
from fp8lm.parallel.tensor_parallel import TensorParallel


def build_tp_context(
    config: Config, groups: ProcessGroups, kernels: Kernels, counter: WireCounter
) -> TPContext:
    """The tensor-parallel context of config section `parallel`."""
    parallel, wire = config.parallel, config.precision.wire
    if parallel.tensor_model_parallel_size == 1:
        return NO_TP
    gather_wire = Wire.of_key("gather", wire, counter)
    reduce_wire = Wire.of_key("reduce", wire, counter)
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
class ParallelModel:
    """This rank's `weights` by Megatron name, with their data, tensor and pipeline parallelism.

    `shared_params` are weights that the first pipeline stage holds too; it counts them.
    `histories` are those of delayed scaling.
    """

    weights: dict[str, Param]
    data_parallel: NoDataParallel
    pipeline: Executor
    sharding: OptimizerSharding
    shared_params: frozenset[str]
    histories: AmaxHistories


def parallelize(
    config: Config,
    groups: ProcessGroups,
    chunks: list[GPTModel],
    kernels: Kernels,
    counter: WireCounter,
    device: torch.device,
    capture: GraphCapture | None = None,
) -> ParallelModel:
    """Parallelize `chunks`, this rank's parts of the model; a collective.

    Frozen weights take part in forward and backward only. ValueError if all are frozen. With
    `capture` micro-batches are replayed, which needs a pipeline of one stage.
    """
    weights = {name: weight for chunk in chunks for name, weight in named_params(chunk).items()}
    trained = trainable(weights)
    if not trained:
        raise ValueError("all weights of this pipeline stage are frozen: nothing is left to train")
    pipeline: Executor = NoPipeline(chunks[0].forward_step)
    if groups.dims.pp > 1:
        stages = pipeline_groups(groups)
        pipeline = build_pipeline(config, chunks, stages, weights, kernels, counter, device)
    param_groups = build_param_groups(groups)
    data_parallel = build_data_parallel(config, groups, param_groups, kernels, counter, trained)
    if capture is not None:
        pipeline = GraphedMicrobatches(
            chunks[0],
            capture,
            counter,
            warmup_steps=config.train.cuda_graph_warmup_steps,
            last_is_eager=reduces_in_backward(config, groups.dims.dp),
        )
    if config.parallel.overlap_param_gather and isinstance(data_parallel, ZeroDataParallel):
        for chunk in chunks:
            data_parallel.overlap_gather(chunk)
    shared = shared_params(config, groups.pipeline_parallel.rank())
    scalars = Wire("grads", "fp32", counter)
    sharding = OptimizerSharding.build(
        trained,
        chunks[0].tp,
        local_shards=data_parallel.local_shards,
        gather=lambda values: all_gather_scalars(values, groups.world, scalars),
        max=max_by_group(trained, param_groups, scalars),
        is_norm_owner=data_parallel.is_norm_owner,
        shared_params=shared,
    )
    holders = param_groups[DENSE].amax_group
    histories = AmaxHistories(
        {key: quantizer for chunk in chunks for key, quantizer in quantizers_of(chunk).items()},
        config.precision,
        device,
        share=lambda amaxes: max_over_group(amaxes, holders, scalars).wait(),
    )
    return ParallelModel(weights, data_parallel, pipeline, sharding, shared, histories)


def stage_specs(config: Config, stage: int) -> list[StageSpec]:
    """The parts of the model that pipeline stage `stage` holds, one per chunk."""
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
        StageSpec(ranges[virtual], has_embedding=virtual == 0, has_head=virtual == last)
        for virtual in range(stage, stages * chunks, stages)
    ]


def shared_params(config: Config, stage: int) -> frozenset[str]:
    """Weights of this stage that the first stage holds too, and counts."""
    stages = config.parallel.pipeline_model_parallel_size
    untied = config.model.untie_embeddings_and_output_weights
    last = stages > 1 and stage == stages - 1
    return frozenset({WORD_TABLE} if last and not untied else ())


def build_pipeline(
    config: Config,
    chunks: list[GPTModel],
    groups: PipelineGroups,
    weights: dict[str, Param],
    kernels: Kernels,
    counter: WireCounter,
    device: torch.device,
) -> Pipeline:
    """The executor of this stage's `chunks`."""
    parallel, model, train = config.parallel, config.model, config.train
    stages = parallel.pipeline_model_parallel_size
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    shape = (model.seq_length // split, train.micro_batch_size, model.hidden_size)
    wire = Wire.of_key("pipeline", config.precision.wire, counter)
    wgrad_store = WeightGradStore()
    for weight in weights.values():
        if isinstance(weight, QuantizedParam):
            weight.use_wgrad_store(wgrad_store)
    tied = None
    tied_weights = not model.untie_embeddings_and_output_weights
    if groups.embd is not None and tied_weights and weights[WORD_TABLE].spec.trainable:
        fp32 = Wire("pipeline", "fp32", counter)
        tied = TiedEmbeddingSync(groups.embd, fp32, kernels, weights[WORD_TABLE])
    return Pipeline(
        [chunk.forward_step for chunk in chunks],
        schedule_maker(parallel.pipeline_schedule, stages, len(chunks)),
        groups,
        PipelineP2P(shape, chunks[0].dtype, wire, kernels),
        device,
        wgrad_store,
        tied,
    )
