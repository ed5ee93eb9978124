"""Section `tuning`: conversations and preferences, for `train.objective` sft and dpo."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.paths import PathText
from fp8lm.config.section import Bool, NonNegative, Positive, Section, Smoothing


class TuningConfig(Section):
    """How examples become samples, and the loss of preferences under TRL's names."""

    chat_template: PathText | None = Field(
        None,
        description="File of the Jinja template that renders conversations; it goes into the "
        "checkpoints. Null: that of the data or of the tokenizer.",
    )
    packing: Bool = Field(
        True,
        description="Put several examples into a sample, which do not see each other; false: one, "
        "and padding.",
    )
    on_long_example: Literal["error", "skip"] = Field(
        "error",
        description="An example longer than model.seq_length ends the run before it starts, or is "
        "left out and counted.",
    )
    on_bad_line: Literal["error", "skip"] = Field(
        "error",
        description="A line of JSON that is no example ends the run before it starts, or is left "
        "out and counted.",
    )
    beta: Positive = Field(
        0.1,
        description="dpo: how closely the model is held to the reference; 0.01 to 0.5 is usual.",
    )
    loss_type: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="dpo: the loss of a pair, the logistic one of DPO, or IPO's squared distance "
        "of the margin from 1 / (2 beta).",
    )
    label_smoothing: Smoothing = Field(
        0.0,
        description="dpo: the share of pairs that are taken for the other way round (conservative "
        "DPO); with loss_type sigmoid.",
    )
    length_normalized: Bool = Field(
        False,
        description="dpo: compare log-probabilities per token, not of whole answers, so that "
        "length is no advantage.",
    )
    sft_loss_weight: NonNegative = Field(
        0.0, description="dpo: weight of the chosen answer's loss per token, added to the loss."
    )
    reference_logprobs: PathText | None = Field(
        None,
        description="dpo: file of the reference's log-probabilities, which "
        "tools/reference_logprobs.py writes; null: a frozen copy of the first weights, in FP8 "
        "where the GEMMs are, computes them in every step.",
    )
