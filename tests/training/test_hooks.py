"""The training loop as its hooks see it: what they are told, in which order, what they may do."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from fp8lm.checkpoint import latest_iteration
from fp8lm.comm.groups import process_groups
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from fp8lm.training.stopping import TIME_IS_OVER
from fp8lm.training.trainer import TrainerHook
from tests.training.runs import trainer_of


class Recording(TrainerHook):
    """Notes every call but what is said."""

    def __init__(self):
        self.events = []

    @contextmanager
    def running(self, trainer):
        self.events.append("open")
        yield
        self.events.append("close")

    @contextmanager
    def phase(self, trainer, name):
        self.events.append(f"{name} {trainer.progress.iteration}")
        yield
        self.events.append(f"{name} done")

    def on_start(self, trainer):
        self.events.append("start")

    def before_step(self, trainer):
        self.events.append("before")

    def on_scalars(self, trainer, scalars):
        assert scalars.loss > 0 and (scalars.skipped_in_a_row, scalars.stop) == (0, 0)
        self.events.append(f"scalars {scalars.iteration}")

    def after_step(self, trainer, result):
        self.events.append(f"after {trainer.progress.iteration}")

    def on_evaluation(self, trainer, split, loss):
        self.events.append(split)

    def on_end(self, trainer):
        self.events.append("end")


def step(iteration):
    """The events of a step that ends as number `iteration`."""
    return ["before", f"step {iteration - 1}", "step done", f"scalars {iteration}"]


def during(name, iteration, *events):
    return [f"{name} {iteration}", f"{name} done", *events]


def test_the_order_of_events(tiny_config, train_run, tmp_path):
    config = tiny_config(
        {"train": {"train_iters": 2, "eval_interval": 4}, "scheduler": {"lr_warmup_iters": 1}},
        {"data": {"split": "8,1,1"}},
        {"checkpoint": {"save": str(tmp_path), "save_interval": 1, "async_save": False}},
    )
    hook = Recording()
    train_run(config, lambda trainer: trainer.hooks.append(hook))
    save = lambda iteration: during("saving a checkpoint", iteration)  # noqa: E731
    assert hook.events == [
        *("open", *during("evaluation", 0, "validation"), "start"),
        *(*step(1), *save(1), "after 1"),
        *(*step(2), *during("evaluation", 2, "validation"), *save(2), "after 2"),
        *during("evaluation", 2, "test"),
        *(*during("saving the last checkpoint", 2), "end", "close"),
    ]


def test_a_run_with_nothing_left_opens_and_closes(tiny_config, train_run, tmp_path):
    config = tiny_config({"checkpoint": {key: str(tmp_path) for key in ("save", "load")}})
    train_run(config)
    hook = Recording()
    train_run(config, lambda trainer: trainer.hooks.append(hook))
    assert hook.events == ["open", "close"]


class Asking(TrainerHook):
    """Asks on one rank to stop in the step that follows `iteration`."""

    def __init__(self, rank, iteration):
        self.rank, self.iteration, self.asks = rank, iteration, False

    def before_step(self, trainer):
        here = dist.get_rank() == self.rank
        self.asks = here and trainer.progress.iteration == self.iteration

    def stop_reason(self):
        return TIME_IS_OVER if self.asks else 0.0


def stopped_at(config, rank):
    with trainer_of(config) as trainer:
        trainer.hooks.append(Asking(rank, 3))
        return trainer.train(), trainer.progress.iteration


def test_one_rank_stops_all(tiny_config, run_distributed, tmp_path):
    config = tiny_config({"checkpoint": {"save": str(tmp_path)}})
    assert run_distributed(stopped_at, 2, config, 1) == [(0, 4)] * 2
    assert latest_iteration(tmp_path) == 4


def test_a_hook_that_fails_ends_the_run_and_the_others_hear_of_it(tiny_config, train_run):
    class Failing(TrainerHook):
        def after_step(self, trainer, result):
            raise ArithmeticError("of a hook")

    class Closing(TrainerHook):
        seen = None

        @contextmanager
        def running(self, trainer):
            try:
                yield
            except ArithmeticError as error:
                self.seen = str(error)
                raise

    closing = Closing()
    with pytest.raises(ArithmeticError, match="of a hook"):
        train_run(tiny_config(), lambda trainer: trainer.hooks.extend((closing, Failing())))
    assert closing.seen == "of a hook"


def test_a_trainer_loads_and_makes_nothing_before_it_is_told(tiny_config, tmp_path):
    device, folder = torch.device("cpu"), tmp_path / "run"
    config = tiny_config(
        {"checkpoint": {key: str(folder) for key in ("save", "load")}},
        {"logging": {"dir": str(folder)}},
    )
    with process_groups(device) as groups:
        trainer = build_trainer(build(config, groups, device))
        assert not folder.exists()
        with pytest.raises(RuntimeError, match="load"):
            trainer.train()
        assert not folder.exists()
