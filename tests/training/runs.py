"""Runs of several ranks, as functions that the workers call; what they left behind."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.model.objectives import LanguageModeling
from fp8lm.training.build import build
from fp8lm.training.checkpointing import RunCheckpoints
from fp8lm.training.hooks import build_trainer
from fp8lm.training.state import model_tensors, optimizer_tensors
from fp8lm.training.train_state import TrainState
from fp8lm.training.trainer import TrainerHook

LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "ffn_hidden_size": 64,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}

# Mock data with an end of document in nearly every sample, and documents kept apart.
TOGETHER = {
    "data": {"shuffle_seed": 1, "eod_mask_loss": True},
    "tokenizer": {"vocab_size": 31},
}
APART = TOGETHER | {
    "data": TOGETHER["data"] | {"reset_position_ids": True, "reset_attention_mask": True}
}


@contextlib.contextmanager
def trainer_of(config, device="cpu"):
    """A trainer of this rank's part of the job, within its process groups."""
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    with contextlib.redirect_stdout(io.StringIO()), model_parallel_groups(dims) as groups:
        trainer = build_trainer(build(config, groups, torch.device(device)))
        trainer.load()
        yield trainer


class BeforeStep(TrainerHook):
    """Calls `act` with the trainer before every step."""

    def __init__(self, act):
        self.act = act

    def before_step(self, trainer):
        self.act(trainer)


def train(config, device="cpu"):
    """Train on all ranks; this rank's state, and how each weight is split."""
    with trainer_of(config, device) as trainer:
        trainer.train()
    run = trainer.run
    tensors = model_tensors(run.weights) | optimizer_tensors(run.optimizer)
    # An initializer is a local function, which does not travel between processes.
    specs = {name: replace(weight.spec, init=None) for name, weight in run.weights.items()}
    return tensors, specs


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    """All that is reported and does not measure time or memory."""
    timing = {"iteration-time", "throughput", "tokens-per-second", "timestamp"}
    return [
        {key: v for key, v in line.items() if key not in timing and "memory" not in key}
        for line in read(folder)
    ]


def save_again(config, folder):
    """Load a checkpoint under this layout and save it elsewhere."""
    with trainer_of(config) as trainer:
        checkpoint = trainer.run.config.checkpoint.model_copy(update={"save": folder})
        run = replace(
            trainer.run, config=trainer.run.config.model_copy(update={"checkpoint": checkpoint})
        )
        state = TrainState(run, trainer.window, trainer.progress, trainer.losses)
        checkpoints = RunCheckpoints(state, print)
        checkpoints.open()
        checkpoints.finish()


def train_with_infinite_loss(config, bad_rank):
    """Train where the losses of one rank are Inf, its gradients as ever.

    Steps that were skipped since the last report, and whether every byte is what it was.
    """
    with trainer_of(config) as trainer:
        run = trainer.run
        tensors = lambda: model_tensors(run.weights) | optimizer_tensors(run.optimizer)  # noqa: E731
        before = {name: tensor.clone() for name, tensor in tensors().items()}
        if run.groups.world.rank() == bad_rank:
            trainer.run = replace(run, objective=Infinite(run.objective.num_ids, run.objective.tp))
        trainer.train()
        run.optimizer.share_amax()
        same = all(torch.equal(before[name], tensor) for name, tensor in tensors().items())
    return int(trainer.window.skipped_in_a_row), same


class Infinite(LanguageModeling):
    """Losses that are Inf, and tell backward nothing of it."""

    def loss(self, output, batch):
        return super().loss(output, batch) + float("inf")
