"""Section `tuning`: conversations, for `train.objective` sft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.paths import PathText
from fp8lm.config.section import Bool, Section


class TuningConfig(Section):
    """How examples are read and become samples."""

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
