"""`precision.kernels=compiled` trains to the same bytes."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.training.runs import curve


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_and_eager_train_alike(tiny_config, train_run, tmp_path):
    # Wide enough for casts and decodes that are compiled.
    model = {"num_layers": 1, "hidden_size": 256, "seq_length": 128}
    states = {}
    for kernels in ("eager", "compiled"):
        trainer = train_run(
            tiny_config(
                {"model": model, "precision": {"preset": "o3", "kernels": kernels}},
                {"train": {"train_iters": 3, "eval_interval": 3}},
                {"logging": {"dir": str(tmp_path / kernels), "log_interval": 1}},
            )
        )
        states[kernels] = {
            name: tensor.payload
            for name, weight in trainer.run.weights.items()
            for tensor in (weight.model_param,)
        }
    assert curve(tmp_path / "compiled") == curve(tmp_path / "eager")
    for name, payload in states["compiled"].items():
        assert torch.equal(payload, states["eager"][name]), name
