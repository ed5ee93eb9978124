"""The hook that evaluates the model on zero-shot tasks while it trains."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fp8lm.checkpoint.collectives import all_or_error
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import TrainConfig
from fp8lm.generate.live import LiveModel
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.errors import InputError
from fp8lm.training.step import StepResult
from fp8lm.training.trainer import Trainer, TrainerHook

Metrics = Mapping[str, Mapping[str, float]]  # by task and metric
KEYS = ("train.eval_tasks", "train.eval_tasks_folder", "train.eval_tasks_data")
STDERR = "_stderr"


class TaskHook(TrainerHook):
    """Evaluates every `interval` iterations, before the first step and at the end.

    `evaluate` is a collective of all ranks. It computes with the training's weights, which are not
    copied; training goes on as if it had not been called. Metrics are reported as
    `tasks/TASK/METRIC`.
    """

    _model: LiveModel

    def __init__(self, interval: int, evaluate: Callable[[InferenceModel], Metrics]) -> None:
        self._interval, self._evaluate = interval, evaluate

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """See `TrainerHook`."""
        self._model = LiveModel.of(trainer.run)
        yield

    def on_start(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        if trainer.progress.iteration == 0:
            self._report(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """See `TrainerHook`."""
        wanted = trainer.due(self._interval) or trainer.finished
        if wanted and not trainer.stop:  # who asked to stop waits for the last checkpoint
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        with trainer.phase("evaluation on tasks"):
            model = self._model.open(() if trainer.guard is None else trainer.guard.in_bf16)
            with model.ready():
                metrics = self._evaluate(model)
        iteration = trainer.progress.iteration
        for task, found in metrics.items():
            trainer.say(f" {task} at iteration {iteration} | {describe(found)}")
        reported = {
            f"tasks/{task}/{name}": value
            for task, found in metrics.items()
            for name, value in found.items()
        }
        for hook in trainer.hooks:
            hook.on_metrics(trainer, reported)


def describe(metrics: Mapping[str, float]) -> str:
    """One line of a task's metrics with their standard errors."""
    parts = []
    for key, value in metrics.items():
        name, _, kept = key.partition(",")
        if name.endswith(STDERR) or key == "samples":
            continue
        error = metrics.get(",".join(filter(None, (name + STDERR, kept))), math.nan)
        parts.append(f"{key}: {value:.4f}" + (f" +- {error:.4f}" if math.isfinite(error) else ""))
    return " | ".join(parts)


def check_installed(train: TrainConfig) -> None:
    """`InputError` for tasks without the package that has them."""
    if train.eval_tasks and find_spec("lm_eval") is None:
        raise InputError(
            f'{KEYS[0]} = {", ".join(train.eval_tasks)} needs lm-eval: pip install "fp8lm[eval]"'
        )


def task_hooks(train: TrainConfig, groups: ProcessGroups) -> list[TrainerHook]:
    """The hook that config section `train` asks for, with its tasks loaded.

    A collective of all ranks; `InputError` for tasks that are unknown or whose data cannot be
    loaded.
    """
    if not train.eval_tasks:
        return []
    check_installed(train)
    from fp8lm.evaluation.harness import Tasks, TaskSource  # takes seconds to import

    folder, data = (
        None if path is None else Path(path)
        for path in (train.eval_tasks_folder, train.eval_tasks_data)
    )
    source = TaskSource(train.eval_tasks, folder, data, train.eval_tasks_num_fewshot, KEYS)
    tasks = all_or_error(groups.world, lambda: Tasks.load(source))
    batch_size, limit = train.eval_tasks_batch_size, train.eval_tasks_limit

    def evaluate(model: InferenceModel) -> Metrics:
        # Bars and remarks of the library would lie across the log.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return tasks.evaluate(model, batch_size=batch_size, limit=limit)

    return [TaskHook(train.eval_tasks_interval, evaluate)]
