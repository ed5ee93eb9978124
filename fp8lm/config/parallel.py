"""Section `parallel`: how many ranks hold the model together, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.section import Bool, Count, Section


class ParallelConfig(Section):
    """Layers divided over tensor-parallel ranks; optimizer states over data-parallel ones."""

    tensor_model_parallel_size: Count = Field(
        1, description="Ranks that hold a part of every layer each."
    )
    sequence_parallel: Bool = Field(
        False,
        description="Divide the sequence between those ranks where a layer is not divided; needs "
        "tensor_model_parallel_size above 1.",
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
        description="Let the next forward begin before all stepped weights have arrived; each "
        "bucket of them is dealt out, and padded, on its own.",
    )
    ddp_bucket_size: Count = Field(
        40_000_000,
        description="Parameters in a bucket of gradients, and of overlapped weights, about.",
    )
    node_size: Count | None = Field(
        None,
        description="Processes on a machine, between which data-parallel ranks sum gradients "
        "before these cross to another. Null: what torchrun says.",
    )
