"""A training run of a tiny model on mock data, in this process."""

from __future__ import annotations

import json

import pytest
import torch

from fp8lm.comm.groups import process_groups
from fp8lm.config import build_config
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer

TINY = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16},
    "train": {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": 8,
        "eval_interval": 4,
        "eval_iters": 1,
        "num_threads": 1,
    },
    "optimizer": {"lr": 1e-2},
    "scheduler": {"lr_warmup_iters": 2},
    "data": {"mock_data": True},
    "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 63},
    "logging": {"log_interval": 3, "tensorboard": False},
}


@pytest.fixture
def tiny_config():
    """`tiny_config({"train": {"seed": 2}})`: the tiny config with sections updated."""

    def make(*changes):
        sections = {name: dict(keys) for name, keys in TINY.items()}
        for change in changes:
            for name, keys in change.items():
                sections.setdefault(name, {}).update(keys)
        return build_config(sections)

    return make


@pytest.fixture
def train_run():
    """`train_run(config)` trains and returns the trainer, which `prepare` may change first."""

    def train(config, prepare=lambda trainer: None):
        device = torch.device("cpu")
        with process_groups(device) as groups:
            trainer = build_trainer(build(config, groups, device))
            trainer.load()
            prepare(trainer)
            trainer.train()
        return trainer

    return train


@pytest.fixture
def read_metrics():
    """`read_metrics(folder)`: the objects in its metrics.jsonl."""

    def read(folder):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def folders(tmp_path):
    def make(run, load=None):
        return {
            "checkpoint": {"save": str(tmp_path / run), "load": str(tmp_path / (load or run))},
            "logging": {"dir": str(tmp_path / run), "log_interval": 1},
        }

    return make
