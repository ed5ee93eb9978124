"""Section `parallel`: sizes of tensor, pipeline and data parallelism, and their options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.section import Bool, Count, Positive, Section


class ParallelConfig(Section):
    """How many processes hold the model together, and how replicas divide its states."""

    tensor_model_parallel_size: Count = Field(
        1, description="Ranks that hold a part of every layer each."
    )
    sequence_parallel: Bool = Field(
        False,
        description="Divide the sequence between those ranks where a layer is not divided; needs "
        "tensor_model_parallel_size above 1.",
    )
    pipeline_model_parallel_size: Count = Field(
        1, description="Stages, each of which holds some of the layers."
    )
    num_layers_per_virtual_pipeline_stage: Count | None = Field(
        None,
        description="Layers in each of several chunks per stage (interleaved schedule). Null: one "
        "chunk.",
    )
    pipeline_schedule: Literal["1f1b", "zb-h1"] = Field(
        "1f1b",
        description="Order of work in a stage of one chunk; zb-h1 computes weight gradients where "
        "a stage would wait.",
    )
    decoder_first_pipeline_num_layers: Count | None = Field(
        None, description="Layers of the first stage. Null: as many as the others."
    )
    decoder_last_pipeline_num_layers: Count | None = Field(
        None, description="Layers of the last stage. Null: as many as the others."
    )
    use_distributed_optimizer: Bool = Field(
        True,
        description="Give each data-parallel rank the optimizer states of some weights only "
        "(ZeRO); false: every rank holds all of them.",
    )
    partition: Literal["tensor", "even"] = Field(
        "tensor",
        description="How those weights are dealt out: tensor, whole (FP8-LM, Algorithm 1), or "
        "even, cut between rows, for more ranks than tensors go round.",
    )
    overlap_grad_reduce: Bool = Field(
        True,
        description="Send a bucket of gradients as soon as the last backward is done with it.",
    )
    overlap_param_gather: Bool = Field(
        False,
        description="Let the next forward begin before all stepped weights have arrived, bucket by "
        "bucket.",
    )
    ddp_bucket_size: Count = Field(
        40_000_000,
        description="Parameters in a bucket of gradients, and of overlapped weights, about.",
    )
    node_size: Count | None = Field(
        None,
        description="Processes on a machine, between which data-parallel ranks sum gradients "
        "before these cross to another. Null: what torchrun says; machines with different numbers "
        "of processes do no such sums.",
    )

    distributed_timeout_minutes: Positive = Field(
        10.0, description="Give up on a collective, and so end the job, after so many minutes."
    )

    def num_chunks(self, num_layers: int) -> int:
        """Chunks of a model of `num_layers` on every stage."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return 1
        per_round = self.num_layers_per_virtual_pipeline_stage * self.pipeline_model_parallel_size
        return max(1, num_layers // per_round)
