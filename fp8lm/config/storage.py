"""Sections `data`, `tokenizer`, `checkpoint` and `logging`: input and output of a run."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fp8lm.config.paths import PathText
from fp8lm.config.section import (
    Bool,
    Count,
    NonNegative,
    Section,
    Size,
    Text,
    Texts,
    as_list,
)

DataPath = Annotated[
    tuple[NonNegative | PathText, ...],
    BeforeValidator(as_list, json_schema_input_type=list[NonNegative | Text] | Text),
]


class DataConfig(Section):
    """Where tokens come from."""

    data_path: DataPath | None = Field(
        None,
        description="[prefix], or for a blend [weight1, prefix1, weight2, prefix2, ...], of .bin "
        "and .idx files; [prefix1, prefix2, ...] takes each once, by its size; give this or "
        "mock_data.",
    )
    split: Text = Field("99,1,0", description="Shares for training, validation and test.")
    shuffle_seed: Size | None = Field(
        None,
        description="Seed of the order of the data alone, so that runs of several train.seed read "
        "the same; null: train.seed.",
    )
    data_cache_path: PathText | None = Field(
        None, description="Folder for the sample indices; null: beside the data."
    )
    mock_data: Bool = Field(False, description="Seeded synthetic tokens, no files needed.")
    num_workers: Size = Field(0, description="Processes that load batches; 0: the training one.")
    worker_timeout: NonNegative = Field(
        300.0, description="Seconds without a batch from these processes that end the run; 0: none."
    )
    eod_mask_loss: Bool = Field(
        False,
        description="Take no loss where the input is an end-of-document token, that is on the "
        "first token of the next document; the end-of-document token itself is still predicted.",
    )
    reset_position_ids: Bool = Field(
        False,
        description="Positions restart after every end-of-document token: each document of a "
        "sample counts from 0.",
    )
    reset_attention_mask: Bool = Field(
        False,
        description="Tokens attend within their own document only, which ends with the "
        "end-of-document token.",
    )


class TokenizerConfig(Section):
    """What turned the text into tokens."""

    tokenizer_type: Literal[
        "SentencePieceTokenizer",
        "HuggingFaceTokenizer",
        "GPT2BPETokenizer",
        "TikTokenizer",
        "NullTokenizer",
    ] = Field("SentencePieceTokenizer", description="Kind of tokenizer.")
    tokenizer_model: PathText | None = Field(
        None, description="Local file or folder of the tokenizer; NullTokenizer has none."
    )
    vocab_size: Count | None = Field(
        None,
        description="Tokens of a NullTokenizer, which adds its end-of-document token; the other "
        "kinds know their size.",
    )


class CheckpointConfig(Section):
    """Where and when the state of a run is kept."""

    save: PathText | None = Field(None, description="Folder to save to; null: nothing is saved.")
    load: PathText | None = Field(
        None,
        description="Folder to resume from, or one checkpoint (.../iter_0000100); the same folder "
        "as save continues a run.",
    )
    pretrained: PathText | None = Field(
        None,
        description="Checkpoint, or folder of checkpoints, whose weights a new run starts from; "
        "optimizer, schedule and data start anew. Not read if load has a checkpoint.",
    )
    save_interval: Count | None = Field(
        None, description="Iterations between checkpoints; null: only at the end."
    )
    async_save: Bool = Field(
        False, description="Write checkpoints beside the training, from copies in host memory."
    )
    keep_last: Count | None = Field(
        None, description="Checkpoints to keep; null: all, or one with save_retain_interval."
    )
    save_retain_interval: Count | None = Field(
        None, description="Keep the checkpoints of every so-many-th iteration besides."
    )
    exit_on_missing_checkpoint: Bool = Field(
        False,
        description="Do not start where load has no checkpoint, even if it is the same as save.",
    )
    allow_tokenizer_change: Bool = Field(
        False,
        description="Go on from a checkpoint with another tokenizer than it was trained with.",
    )
    extend_embeddings: Bool = Field(
        False,
        description="Load a checkpoint of fewer tokens or learned positions: the new rows start "
        "from initial values.",
    )
    ckpt_format: Literal["torch_dist"] = Field(
        "torch_dist", description="torch.distributed.checkpoint, the only one there is."
    )

    @property
    def resumes(self) -> bool:
        """Whether the same command goes on from what it has saved: one folder for both."""
        if self.save is None or self.load is None:
            return False
        return os.path.realpath(self.save) == os.path.realpath(self.load)


class LoggingConfig(Section):
    """What a run reports, and where."""

    dir: PathText | None = Field(
        None,
        description="Folder for config.yaml, starts.jsonl, metrics.jsonl and tensorboard/; null: "
        "only the log.",
    )
    log_interval: Count = Field(100, description="Iterations between reports.")
    fp8_stats_interval: Count | None = Field(
        None,
        description="Iterations between statistics of what casts to low precision do to every "
        "layer's tensors; null: none.",
    )
    fp8_stats_layers: Texts = Field(
        ("*",),
        description="Layers that have statistics, by name; * stands for anything: "
        "decoder.layers.0.*, *.linear_fc2.",
    )
    fp8_stats_what_if: Bool = Field(
        False,
        description="Measure the operands of GEMMs in BF16 or fp32 as if they were cast to FP8 "
        "with a scale per tensor, which says what FP8 would do to a BF16 run.",
    )
    tensorboard: Bool = Field(True, description="Write TensorBoard events into dir.")
    wandb_project: Text | None = Field(
        None,
        description="Project at Weights & Biases; null: not used. Without dir and wandb_save_dir "
        "every start is a run of its own there.",
    )
    wandb_exp_name: Text | None = Field(
        None, description="Name of the run there; null: chosen by wandb."
    )
    wandb_entity: Text | None = Field(
        None, description="User or team that the project belongs to; null: the key's own."
    )
    wandb_group: Text | None = Field(
        None, description="Group of runs shown together there, such as seeds of one setting."
    )
    wandb_tags: Texts = Field((), description="Tags of the run there.")
    wandb_save_dir: PathText | None = Field(
        None, description="Folder for wandb's own files; null: dir, else the current folder."
    )
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None,
        description="offline keeps the run on disk for `wandb sync`; null: what WANDB_MODE says, "
        "else online.",
    )
