"""Subsection `precision.guard`: bounds of statistics, and what happens beyond them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.section import Count, Positive, PositiveShare, Section


class GuardConfig(Section):
    """Bounds of statistics of GEMM operands, and what to do about a layer that leaves them."""

    action: Literal["off", "warn", "bf16"] = Field(
        "off",
        description="warn: name the layer and its tensor; bf16: run the layer's GEMMs in BF16 as "
        "well. Looks at the statistics of logging.fp8_stats_interval.",
    )
    max_underflow: PositiveShare | None = Field(
        0.2, description="Largest share of a tensor that a cast makes zero; null: any."
    )
    max_saturation: PositiveShare | None = Field(
        1e-3, description="Largest share beyond the range of the format and its scale; null: any."
    )
    max_kurtosis: Positive | None = Field(
        None, description="Largest kurtosis (3: a normal distribution); null: any."
    )
    min_snr: Positive | None = Field(
        15.0, description="Least signal-to-noise ratio of a cast in dB; null: any."
    )
    patience: Count = Field(
        1, description="Statistics in a row outside the bounds before the guard acts."
    )
    return_after: Count | None = Field(
        10,
        description="Statistics in a row within the bounds before a layer returns from BF16; "
        "null: it stays there.",
    )
