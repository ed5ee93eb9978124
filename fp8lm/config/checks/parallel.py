"""Checks that a model divides over its ranks."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config

TENSOR_PARALLEL = "parallel.tensor_model_parallel_size"
QKV_WIDTH = "the width of queries, keys and values (model.num_query_groups, model.kv_channels)"
PIPELINE_PARALLEL = "parallel.pipeline_model_parallel_size"


def tensor_parallel(config: Config) -> Iterator[str]:
    """Sizes that are split over tensor-parallel ranks must be divisible."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    if ranks == 1:
        if config.parallel.sequence_parallel:
            yield (
                f"parallel.sequence_parallel = true needs {TENSOR_PARALLEL} > 1: one rank has the "
                "whole sequence"
            )
        return
    divided = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    if ranks > model.num_query_groups:
        divided[QKV_WIDTH] = model.query_projection_size + 2 * model.kv_projection_size
    if config.parallel.sequence_parallel:
        divided["model.seq_length"] = model.seq_length
    for name, size in divided.items():
        if size % ranks:
            yield f"{name} = {size} is not divisible by {TENSOR_PARALLEL} = {ranks}"
    groups = model.num_query_groups
    if groups % ranks and ranks % groups:
        yield (
            f"model.num_query_groups = {groups} and {TENSOR_PARALLEL} = {ranks}: one must be a "
            "multiple of the other"
        )


def replicas(config: Config) -> Iterator[str]:
    """Keys of the distributed optimizer require it."""
    parallel = config.parallel
    if parallel.use_distributed_optimizer:
        return
    whole = "parallel.use_distributed_optimizer = false, every rank steps all weights"
    if parallel.partition != "tensor":
        yield f"parallel.partition = {parallel.partition} has nothing to divide: with {whole}"
    if parallel.overlap_param_gather:
        yield f"parallel.overlap_param_gather = true has nothing to gather: with {whole}"


def pipeline(config: Config) -> Iterator[str]:
    """Layers divide over the stages, and pipeline keys require several stages."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ):
            if (value := getattr(parallel, name)) is not None:
                yield f"parallel.{name} = {value} needs {PIPELINE_PARALLEL} > 1"
        if parallel.pipeline_schedule != "1f1b":
            schedule = parallel.pipeline_schedule
            yield f"parallel.pipeline_schedule = {schedule} needs {PIPELINE_PARALLEL} > 1"
    elif parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield from _interleaved(config)
    else:
        yield from _uneven(config)


def _interleaved(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    if virtual is not None and layers % (virtual * stages):
        yield (
            f"model.num_layers = {layers} is not divisible by {PIPELINE_PARALLEL} = {stages} times "
            f"parallel.num_layers_per_virtual_pipeline_stage = {virtual}"
        )
    outer = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if outer != (None, None) or parallel.pipeline_schedule != "1f1b":
        yield (
            "parallel.num_layers_per_virtual_pipeline_stage has a schedule of its own with "
            "equal stages: drop parallel.decoder_first_pipeline_num_layers, "
            "parallel.decoder_last_pipeline_num_layers and parallel.pipeline_schedule"
        )


def _uneven(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    outer = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    given = [number for number in outer if number is not None]
    left, shared = layers - sum(given), stages - len(given)
    if left < shared or (left % shared if shared else left):
        yield (
            f"model.num_layers = {layers}: the {left} layers of the {shared} pipeline stages "
            f"without a number of their own do not divide evenly ({PIPELINE_PARALLEL} = {stages}): "
            "set parallel.decoder_first_pipeline_num_layers or "
            "parallel.decoder_last_pipeline_num_layers"
        )
