"""`Config`: all sections of one run, fully resolved."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from fp8lm.config.model import ModelConfig
from fp8lm.config.parallel import ParallelConfig
from fp8lm.config.precision import PrecisionConfig
from fp8lm.config.section import Section
from fp8lm.config.storage import CheckpointConfig, DataConfig, LoggingConfig, TokenizerConfig
from fp8lm.config.training import OptimizerConfig, SchedulerConfig, TrainConfig
from fp8lm.config.tuning import TuningConfig
from fp8lm.config.yaml_format import to_yaml
from fp8lm.runtime.files import write_whole


class Config(Section):
    """One run. Each section is valid; `load_config` sees to it that they agree."""

    model: ModelConfig = Field(description="Shape of the network.")
    precision: PrecisionConfig = Field(
        default_factory=PrecisionConfig, description="Storage format of every tensor kept."
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="Ranks that hold the model together."
    )
    train: TrainConfig = Field(description="Batches, length of the run, evaluation, device.")
    optimizer: OptimizerConfig = Field(description="AdamW.")
    scheduler: SchedulerConfig = Field(
        default_factory=SchedulerConfig, description="The learning rate over time."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="Where tokens come from.")
    tokenizer: TokenizerConfig = Field(
        default_factory=TokenizerConfig, description="What turned the text into tokens."
    )
    tuning: TuningConfig = Field(
        default_factory=TuningConfig, description="Examples and their loss, for sft and dpo."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Where and when state is kept."
    )
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, description="What a run reports, and where."
    )

    @property
    def shuffle_seed(self) -> int:
        """The seed of the order of the data."""
        own = self.data.shuffle_seed
        return self.train.seed if own is None else own

    @property
    def separates_documents(self) -> bool:
        """Whether attention stays within the documents of a sample."""
        objective = self.train.objective
        packs = objective == "dpo" or (objective == "sft" and self.tuning.packing)
        return self.data.reset_attention_mask or packs

    def to_yaml(self) -> str:
        """Write every key with its resolved value; loading the text gives an equal config."""
        return to_yaml(self.model_dump(mode="json"))

    def save_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write `to_yaml()` to a file that is either complete or not there."""
        text = "# The resolved config of a run: --config takes it back.\n" + self.to_yaml()
        write_whole(Path(path), text)
