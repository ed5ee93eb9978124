"""Evaluation on tasks while a model trains, which goes on as if there were none."""

from __future__ import annotations

import contextlib
import io
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups, process_groups
from fp8lm.config import build_config
from fp8lm.evaluation.hook import TaskHook, check_installed, describe, task_hooks
from fp8lm.evaluation.scoring import Passage, score_all
from fp8lm.runtime.errors import InputError
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from fp8lm.training.memory import live_tensor_bytes
from tests.generate.models import CPU, PRECISIONS, SHAPES, loaded
from tests.training.runs import curve

LAYOUTS = {
    "tp2 sp zero": (
        4,
        {
            **{"tensor_model_parallel_size": 2, "sequence_parallel": True},
            **{"use_distributed_optimizer": True, "overlap_param_gather": True},
        },
    ),
    "interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
}
RNG = random.Random(0)  # the same texts in every process
TEXTS = [Passage(RNG.sample(range(99), 5 + 7 * i), 3 + i) for i in range(6)]


def config_of(folder, shape="llama", precision="o3", parallel=None, tokenizer=None, **train):
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16}
    return build_config(
        {
            "model": {**sizes, "max_position_embeddings": 64, **SHAPES[shape]},
            "parallel": parallel or {},
            "precision": PRECISIONS[precision],
            "train": {
                **{"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 2},
                **{"eval_iters": 0, "num_threads": 1, **train},
            },
            "optimizer": {"lr": 1e-2},
            "data": {"mock_data": True},
            "tokenizer": tokenizer or {"tokenizer_type": "NullTokenizer", "vocab_size": 99},
            "logging": {"tensorboard": False, "log_interval": 1, "dir": str(folder)},
            "checkpoint": {"save": str(folder / "ck"), "save_interval": 1, "async_save": False},
        }
    )


def scores(model):
    """A task whose metrics are the log-likelihoods of texts; it draws random numbers, too."""
    found = score_all(model, TEXTS, 2)
    torch.rand(1), np.random.rand(), random.random()
    return {"texts": {str(number): score.nats for number, score in enumerate(found)}}


def train(config, interval):
    """Train, with evaluations; the bytes of tensors before and after each."""
    held = []

    class Holding(TaskHook):
        def after_step(self, trainer, result):
            before = live_tensor_bytes()
            super().after_step(trainer, result)
            held.append((before, live_tensor_bytes()))

    hooks = [] if interval is None else [Holding(interval, scores)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if dist.is_initialized():
            dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
            groups = stack.enter_context(model_parallel_groups(dims))
        else:
            groups = stack.enter_context(process_groups(CPU))
        trainer = build_trainer(build(config, groups, CPU), hooks=hooks)
        trainer.load()
        trainer.train()
    return held


def of_checkpoint(folder, tp=1, pp=1):
    with loaded(folder, tp, pp) as model:
        return scores(model)["texts"]


def reported(folder):
    """Scores by iteration."""
    return {
        line["iteration"]: {key[12:]: value for key, value in line.items() if "texts" in key}
        for line in curve(folder)
        if any("tasks/" in key for key in line)
    }


def losses(folder):
    return [line for line in curve(folder) if "lm loss" in line]


@pytest.mark.parametrize(("shape", "precision"), [("llama", "o3"), ("gpt", "te_delayed")])
def test_scores_are_those_of_the_checkpoint_and_training_is_not_disturbed(
    shape, precision, tmp_path
):
    # A process of its own: what other tests have left in this one comes and goes meanwhile.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for name, interval in (("with", 1), ("without", None)):
            config = config_of(tmp_path / name, shape, precision)
            held = process.submit(train, config, interval).result()
            assert [after - before for before, after in held] == [0] * len(held)
            assert len(held) == (2 if interval else 0)
        assert losses(tmp_path / "with") == losses(tmp_path / "without") != []
        found = reported(tmp_path / "with")
        assert found.keys() == {0, 1, 2}
        for iteration in (1, 2):
            folder = tmp_path / "with" / "ck" / f"iter_000000{iteration}"
            assert found[iteration] == process.submit(of_checkpoint, folder).result()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_layouts(run_distributed, layout, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    for name, interval in (("with", 2), ("without", None)):
        run_distributed(train, world_size, config_of(tmp_path / name, parallel=parallel), interval)
    assert losses(tmp_path / "with") == losses(tmp_path / "without") != []
    sizes = [parallel.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline")]
    folder = tmp_path / "with" / "ck" / "iter_0000002"
    expected = run_distributed(of_checkpoint, world_size, folder, *sizes)
    assert all(rank == expected[0] for rank in expected)
    assert reported(tmp_path / "with")[2] == expected[0]


def test_a_line_for_each_task():
    metrics = {"acc": 0.5, "acc_stderr": 0.25, "f1,strict": 0.125, "samples": 4.0}
    assert describe(metrics) == "acc: 0.5000 +- 0.2500 | f1,strict: 0.1250"


def test_without_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8lm.evaluation.hook.find_spec", lambda name: None)
    check_installed(config_of(tmp_path).train)
    with pytest.raises(InputError, match=r"train\.eval_tasks = piqa.*fp8lm\[eval\]"):
        check_installed(config_of(tmp_path, eval_tasks="piqa").train)


@pytest.mark.slow
def test_tasks_of_lm_eval(tmp_path):
    """As the training command evaluates them, and as `tools/evaluate.py` does the checkpoint."""
    pytest.importorskip("lm_eval")
    from fp8lm.evaluation.harness import Tasks, TaskSource
    from tests.evaluation.tasks import KIND, save_model, write_tasks

    folder, data, _ = write_tasks(tmp_path / "made", 6)
    save_model(tmp_path, "bf16")  # for its tokenizer
    tokenizer = {"tokenizer_type": KIND, "tokenizer_model": str(tmp_path / "hub")}
    keys = {"eval_tasks": ["choices", "writing"], "eval_tasks_folder": str(folder)}
    config = config_of(tmp_path / "run", tokenizer=tokenizer, eval_tasks_data=str(data), **keys)
    with process_groups(CPU) as groups:
        hooks = task_hooks(config.train, groups)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = build_trainer(build(config, groups, CPU), hooks=hooks)
            trainer.load()
            trainer.train()
        with pytest.raises(InputError, match=r"train\.eval_tasks choice is unknown"):
            task_hooks(config_of(tmp_path, **keys | {"eval_tasks": "choice"}).train, groups)
    found = {
        line["iteration"]: {key: v for key, v in line.items() if key.startswith("tasks/")}
        for line in curve(tmp_path / "run")
        if "tasks/choices/acc" in line
    }
    assert found.keys() == {0, 2}
    with loaded(tmp_path / "run" / "ck") as model:
        tasks = Tasks.load(TaskSource(keys["eval_tasks"], folder, data))
        expected = tasks.evaluate(model, batch_size=16)
    assert found[2] == {
        f"tasks/{task}/{key}": value for task, own in expected.items() for key, value in own.items()
    }
    assert found[2]["tasks/choices/samples"] == 6
