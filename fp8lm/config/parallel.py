"""Section `parallel`: how many ranks hold the model together, and how."""

from __future__ import annotations

from pydantic import Field

from fp8lm.config.section import Bool, Count, Section


class ParallelConfig(Section):
    """Division of every layer over the ranks of a tensor-parallel group."""

    tensor_model_parallel_size: Count = Field(
        1, description="Ranks that hold a part of every layer each."
    )
    sequence_parallel: Bool = Field(
        False,
        description="Divide the sequence between those ranks where a layer is not divided; needs "
        "tensor_model_parallel_size above 1.",
    )
