"""A run whose last pipeline stage fails in its second step; started by torchrun in a test."""

from __future__ import annotations

import sys

import torch

from fp8lm.comm.groups import process_groups
from fp8lm.config import load_config
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer

config = load_config(sys.argv[1], sys.argv[2:])
device = torch.device("cpu")
with process_groups(device, config.parallel) as groups:
    trainer = build_trainer(build(config, groups, device))
    trainer.load()
    if groups.pipeline_parallel.rank() == 1:
        calls = []

        def fail(*_):
            calls.append(1)
            if torch.is_grad_enabled() and len(calls) > 8:
                raise ArithmeticError("stage 1 broke")

        trainer.run.model.register_forward_pre_hook(fail)
    trainer.train()
