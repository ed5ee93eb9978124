"""tools/reference_logprobs.py: a training that reads its file is the one with the model."""

from __future__ import annotations

import json

import pytest

from fp8lm.runtime.errors import EXIT_BAD_INPUT
from tests.training.runs import read

TINY = ["model.num_layers=2", "model.hidden_size=32", "model.seq_length=32", "train.num_threads=1"]
TINY += ["train.micro_batch_size=2", "train.global_batch_size=4", "train.train_iters=3"]
TINY += ["train.eval_interval=3", "train.eval_iters=2", "logging.tensorboard=false"]
FP32 = ["precision.preset=bf16", "precision.gemm=fp32", "precision.params_dtype=fp32"]
DPO = ["--config", "configs/gpt_tiny.yaml", "train.objective=dpo", *TINY, *FP32]


@pytest.fixture
def run(run_tool, tmp_path, load_pretrain):
    """Train into a folder; its losses and margins, or the exit code."""

    def train(name, *more):
        code = load_pretrain([*DPO, f"logging.dir={tmp_path / name}", *more])
        return code or [
            (line["lm loss"], line["rewards/margins"])
            for line in read(tmp_path / name)
            if "rewards/margins" in line
        ]

    return train


@pytest.fixture
def load_pretrain(capfd):
    from fp8lm.pretrain import main
    from fp8lm.runtime.errors import run_command

    return lambda argv: run_command(main, argv)


def test_losses_from_the_file_are_those_of_the_model(run, run_tool, tmp_path, capfd):
    file = tmp_path / "r.safetensors"
    assert run_tool("reference_logprobs", "--output", file, *DPO) == 0
    reads = f"tuning.reference_logprobs={file}"
    expected = run("model")
    found = run("file", reads)
    assert len(found) == len(expected) == 3
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
    assert not any("state_bytes/reference" in line for line in read(tmp_path / "file"))
    # Of another model, of other examples, no such file.
    for name, more, complaint in (
        ("seed", ["train.seed=7", "data.shuffle_seed=1234"], "of another model"),
        ("data", ["data.shuffle_seed=7"], "of other examples for train"),
        ("none", [f"tuning.reference_logprobs={tmp_path / 'none'}"], "does not exist"),
    ):
        assert run(name, reads, *more) == EXIT_BAD_INPUT
        assert complaint in capfd.readouterr().err
    file.write_text(json.dumps({}))
    assert run("damaged", reads) == EXIT_BAD_INPUT
    assert "is no such file" in capfd.readouterr().err


def test_an_objective_without_a_reference(run_tool, capfd):
    argv = [x for x in DPO if x != "train.objective=dpo"]
    assert run_tool("reference_logprobs", "--output", "x", *argv) == EXIT_BAD_INPUT
    assert "has no reference model" in capfd.readouterr().err
