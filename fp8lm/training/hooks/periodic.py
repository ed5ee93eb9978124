"""Hooks that act every so many iterations and at the end: evaluations and checkpoints."""

from __future__ import annotations

from fp8lm.metrics.console import metrics_line
from fp8lm.training.evaluation import evaluate, first_validation_sample
from fp8lm.training.step import StepResult
from fp8lm.training.trainer import LAST_SAVE, Trainer, TrainerHook

SPLITS = ("train", "validation", "test")


class EvaluationHook(TrainerHook):
    """Validates every `interval` iterations; the finished run is tested."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def on_start(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        if trainer.progress.iteration == 0:
            self._evaluate(trainer, "validation")  # where the curve starts

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """See `TrainerHook`."""
        if trainer.due(self._interval) or trainer.finished:
            self._evaluate(trainer, "validation")

    def on_end(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        if trainer.finished:
            self._evaluate(trainer, "test")

    def _evaluate(self, trainer: Trainer, split: str) -> None:
        dataset = trainer.run.datasets[SPLITS.index(split)]
        if dataset is None:
            return
        train, iteration, first = trainer.run.config.train, trainer.progress.iteration, 0
        if split == "validation":
            first = first_validation_sample(train, iteration, len(dataset))
        with trainer.phase("evaluation"):
            found = evaluate(trainer.run, dataset, first)
        for hook in trainer.hooks:
            hook.on_evaluation(trainer, split, found.loss)
        if found.metrics:
            trainer.say(metrics_line(split, iteration, found.metrics))
            for hook in trainer.hooks:
                hook.on_metrics(trainer, {f"{key} {split}": x for key, x in found.metrics.items()})


class SaveHook(TrainerHook):
    """Saves every `interval` iterations and at the end, and reports finished saves."""

    def __init__(self, interval: int | None) -> None:
        self._interval = interval

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """See `TrainerHook`."""
        if trainer.due(self._interval):
            trainer.drain_scalars()  # a checkpoint knows of all steps before it
            with trainer.phase("saving a checkpoint"):
                trainer.checkpoints.save()
        trainer.checkpoints.tell()

    def on_end(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        with trainer.phase(LAST_SAVE):
            trainer.checkpoints.finish()
