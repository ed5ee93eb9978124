"""How config section `parallel` divides a model's layers over pipeline stages, and joins these."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.groups import PipelineGroups, ProcessGroups
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.config import Config
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import Param, QuantizedParam
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.model.gpt import GPTModel, StageSpec
from fp8lm.optim.clipping import NUM_LEADING
from fp8lm.parallel.pipeline import Batch, Pipeline
from fp8lm.parallel.stages import (
    WORD_TABLE,
    StepExchange,
    TiedEmbeddingSync,
    layer_ranges,
    schedule_maker,
)
from fp8lm.training.step import NUM_TOLD


def stage_specs(config: Config, stage: int) -> list[StageSpec]:
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
        StageSpec(ranges[virtual], has_embedding=virtual == 0, has_head=virtual == last)
        for virtual in range(stage, stages * chunks, stages)
    ]


def shared_params(config: Config, stage: int) -> frozenset[str]:
    """Weights of this stage that the first stage has too, and counts."""
    stages = config.parallel.pipeline_model_parallel_size
    untied = config.model.untie_embeddings_and_output_weights
    last = stages > 1 and stage == stages - 1
    return frozenset({WORD_TABLE} if last and not untied else ())


def build_exchange(
    groups: ProcessGroups, stages: PipelineGroups, wire: Wire, num_weights: int
) -> StepExchange:
    """The step's exchange between stages of different weights; a collective."""
    counts: list[int] = [0] * groups.world.size()
    dist.all_gather_object(counts, num_weights)
    same_shard_ranks = tuple(dist.get_process_group_ranks(stages.same_stage))
    return StepExchange(
        groups.world, same_shard_ranks, NUM_LEADING + NUM_TOLD + 4 * max(counts), wire
    )


def build_pipeline(
    config: Config,
    chunks: list[GPTModel],
    groups: PipelineGroups,
    weights: dict[str, Param],
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
    wgrad_store = WeightGradStore()
    for weight in weights.values():
        if isinstance(weight, QuantizedParam):
            weight.use_wgrad_store(wgrad_store)
    tied = None
    ends = groups.pp_forward.rank() in (0, stages - 1)
    if ends and not model.untie_embeddings_and_output_weights:
        fp32 = Wire("pipeline", "fp32", counter)
        tied = TiedEmbeddingSync(groups.embd, fp32, kernels, weights[WORD_TABLE])
    return Pipeline(
        [partial(run_chunk, chunk) for chunk in chunks],
        schedule_maker(parallel.pipeline_schedule, stages, len(chunks)),
        groups,
        PipelineP2P(shape, chunks[0].dtype, wire, kernels),
        device,
        wgrad_store,
        tied,
    )


def run_chunk(model: GPTModel, h_SBH: Tensor | None, batch: Batch) -> Tensor:
    """Hidden states, or the loss of the model's last part (see `Pipeline`)."""
    samples = batch.get("samples")
    if model.part.has_head:
        return model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], samples, h_SBH)
    return model(batch["tokens"], samples, h_SBH)
