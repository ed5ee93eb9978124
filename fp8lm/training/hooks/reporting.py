"""The hook that reports: log lines, metrics.jsonl, trackers, and files of the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fp8lm.metrics.logger import RunInfo, TrainLogger
from fp8lm.runtime.streams import say
from fp8lm.training.progress import Stopwatch
from fp8lm.training.run_length import end_of_run
from fp8lm.training.run_start import banner, start_facts, write_start
from fp8lm.training.step import StepResult
from fp8lm.training.step_metrics import StepMetrics
from fp8lm.training.trainer import STEP, Trainer, TrainerHook


class ReportHook(TrainerHook):
    """Reports every `interval` iterations, evaluations, and what is said; prints on the main rank.

    A report waits for the device; a step between reports, evaluations and saves does not.
    """

    _logger: TrainLogger
    _metrics: StepMetrics

    def __init__(self, interval: int, is_main: bool) -> None:
        self._interval = interval
        self._print: Callable[[str], None] = say if is_main else _print_nothing
        self._stopwatch = Stopwatch()

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """See `TrainerHook`."""
        run, iteration = trainer.run, trainer.progress.iteration
        position = iteration, trainer.progress.consumed_samples
        facts = start_facts() if run.groups.is_main else {}
        if run.groups.is_main:
            write_start(run.config, facts, iteration, run.groups.world.size())
        info = RunInfo(
            total_iterations=end_of_run(run.config.train, run.batch_size, *position)[0],
            first_iteration=iteration,
            is_main=run.groups.is_main,
            config=run.config.model_dump(mode="json"),
            facts=facts,
            may_write=trainer.locks.held,
        )
        with TrainLogger(run.config.logging, info) as self._logger:
            self._print = self._logger.log_text
            self._metrics = StepMetrics(run)
            for line in banner(run, self._metrics.num_parameters, self._metrics.peak):
                self._print(line)
            yield

    def phase(self, trainer: Trainer, name: str) -> AbstractContextManager[None]:
        """See `TrainerHook`."""
        return nullcontext() if name == STEP else self._stopwatch.paused()

    def before_step(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        self._stopwatch.start(trainer.progress)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """See `TrainerHook`."""
        self._logger.advance()
        if trainer.due(self._interval):
            self._report(trainer, result)

    def on_evaluation(self, trainer: Trainer, split: str, loss: float) -> None:
        """See `TrainerHook`."""
        self._logger.log_validation(trainer.progress.iteration, loss, split)

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """See `TrainerHook`."""
        self._logger.log_metrics(trainer.progress.iteration, metrics)

    def on_message(self, trainer: Trainer, line: str) -> None:
        """See `TrainerHook`."""
        self._print(line)

    def on_rollback(self, trainer: Trainer) -> None:
        """See `TrainerHook`."""
        self._stopwatch.reset()
        self._logger.rewind(trainer.progress.iteration)

    def _report(self, trainer: Trainer, result: StepResult) -> None:
        progress, window = trainer.progress, trainer.window.read()
        before = progress.iteration - 1, progress.consumed_samples - progress.batch_size
        lr = trainer.run.learning_rate.rate(*before)
        interval = self._stopwatch.interval(progress)
        grad_norm = result.grad_norm.item()
        self._logger.log_step(
            self._metrics.values(progress, interval, window, grad_norm, lr, trainer.sent)
        )


def _print_nothing(_line: str) -> None:
    pass
