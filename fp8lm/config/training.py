"""Sections `train`, `optimizer` and `scheduler`: length, batches, AdamW and learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8lm.config.paths import PathText
from fp8lm.config.section import (
    Bool,
    Count,
    NonNegative,
    Positive,
    Section,
    Share,
    Size,
    Texts,
    derived,
)


class TrainConfig(Section):
    """Batches, length of the run, evaluation, device."""

    objective: Literal["pretrain", "sft", "dpo"] = Field(
        "pretrain",
        description="What is learned: pretrain, the next token of text; sft, the answers of "
        "conversations; dpo, which of two answers is preferred.",
    )
    micro_batch_size: Count = Field(description="Samples of one forward and backward pass.")
    global_batch_size: Count = Field(description="Samples of one optimizer step, all ranks.")
    rampup_batch_size: tuple[Count, Count, Count] | None = Field(
        None,
        description="[start, increment, samples]: grow the global batch from start to "
        "global_batch_size by increment over that many samples; needs train_samples.",
    )
    train_iters: Count | None = Field(
        None,
        description="Length of the run in iterations, whatever their batches; give this or "
        "train_samples.",
    )
    train_samples: Count | None = Field(
        None,
        description="Length of the run in samples, a partial last batch is dropped; give this or "
        "train_iters.",
    )
    calculate_per_token_loss: Bool = Field(
        True,
        description="Average the loss over all unmasked tokens of a step; false, the default of "
        "Megatron: over each micro-batch first, then over these.",
    )
    exit_interval: Count | None = Field(
        None, description="Save and stop when the iteration is a multiple of this."
    )
    exit_signal_handler: Bool = Field(
        True,
        description="On SIGTERM, SIGUSR1 or SIGHUP finish the step, save, and exit with code 75; "
        "without checkpoint.save with 128 and the signal's number.",
    )
    exit_duration_in_mins: Positive | None = Field(
        None,
        description="Save and exit with code 75 once the job has run for so many minutes; without "
        "checkpoint.save with 0.",
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None,
        description="Recompute in the backward pass: whole layers (full), attention (selective).",
    )
    seed: Size = Field(
        1234,
        description="Seed of weights, dropout, rounding and data order; where this shuffles files "
        "at most 4294967295.",
    )
    eval_interval: Count = Field(1000, description="Iterations between evaluations.")
    eval_iters: Size = Field(100, description="Batches of one evaluation; 0: no evaluation.")
    eval_new_samples: Bool = Field(
        False,
        description="Evaluate each time on the validation samples after those of the time before, "
        "as Megatron-LM does, instead of on the same.",
    )
    eval_tasks: Texts = Field(
        (),
        description="Tasks or groups of lm-eval to evaluate the model on while it trains; needs "
        "the extra `eval`.",
    )
    eval_tasks_interval: Count = derived(
        lambda train: train["eval_interval"], "eval_interval", "Iterations between these."
    )
    eval_tasks_limit: Count | None = Field(
        None, description="Items of a task, the first; null: all."
    )
    eval_tasks_num_fewshot: Size | None = Field(
        None, description="Examples before each question; null: what the task says."
    )
    eval_tasks_batch_size: Count = Field(16, description="Texts read at once.")
    eval_tasks_folder: PathText | None = Field(
        None, description="YAML files of tasks of your own, in lm-eval's format."
    )
    eval_tasks_data: PathText | None = Field(
        None, description="Local data of tasks: FOLDER/TASK/SPLIT.jsonl."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; auto takes CUDA where there is one."
    )
    enable_cuda_graph: Bool = Field(
        False,
        description="Replay forward and backward of a micro-batch as one CUDA graph: less time of "
        "the host. Results are to be the same, which no GPU has shown yet.",
    )
    cuda_graph_warmup_steps: Count = Field(
        3, description="Steps before the first capture, which is of no use earlier."
    )
    max_consecutive_skips: Count = Field(
        100, description="Stop after this many steps in a row skipped on non-finite values."
    )
    loss_spike_threshold: Positive | None = Field(
        None,
        description="Roll back to the last checkpoint before a loss spike, and go on with the data "
        "behind it: when the loss exceeds its running mean by so many nats. Null: never.",
    )
    loss_spike_patience: Count = Field(
        3, description="Steps in a row for which the loss must exceed it."
    )
    max_rollbacks: Count = Field(3, description="Stop at the loss spike after so many rollbacks.")
    slow_step_factor: NonNegative = Field(
        5.0,
        description="Name the rank that a step waits for when it takes this many times the usual; "
        "0: never.",
    )
    num_threads: Count | None = Field(
        None, description="CPU threads of one process; null leaves PyTorch's choice."
    )


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay."""

    lr: Positive = Field(description="Peak learning rate.")
    min_lr: NonNegative = derived(
        lambda optimizer: 0.1 * optimizer["lr"], "a tenth of lr", "Learning rate after the decay."
    )
    weight_decay: NonNegative = Field(
        0.1, description="Decay of matrices; norms and biases do not decay."
    )
    clip_grad: NonNegative = Field(1.0, description="Bound of the global gradient norm; 0: none.")
    adam_beta1: Share = Field(0.9, description="Decay of the first moment.")
    adam_beta2: Share = Field(0.95, description="Decay of the second moment.")
    adam_eps: Positive = Field(1e-8, description="Added to the square root of the second moment.")


class SchedulerConfig(Section):
    """The learning rate over time; lengths in iterations or, with train_samples, in samples."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        "cosine", description="Shape of the decay from lr to min_lr."
    )
    lr_decay_iters: Count | None = Field(
        None, description="Iterations until min_lr; null: train_iters."
    )
    lr_decay_samples: Count | None = Field(
        None, description="Samples until min_lr; null: train_samples."
    )
    lr_warmup_iters: Size = Field(0, description="Iterations of linear warm-up.")
    lr_warmup_samples: Size = Field(0, description="Samples of linear warm-up.")
    lr_warmup_fraction: Share | None = Field(
        None, description="Warm-up as a share of the decay, instead of a length."
    )
    lr_warmup_init: NonNegative = Field(0.0, description="Learning rate the warm-up starts from.")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        "exponential", description="Shape of the final decay of WSD."
    )
    lr_wsd_decay_iters: Count | None = Field(
        None, description="Iterations of the final decay of WSD."
    )
    lr_wsd_decay_samples: Count | None = Field(
        None, description="Samples of the final decay of WSD."
    )
