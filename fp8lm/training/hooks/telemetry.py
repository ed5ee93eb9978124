"""The hook that reports statistics of casts, and acts on them through the guard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fp8lm.checkpoint.collectives import from_all
from fp8lm.parallel.data_parallel import BucketedDataParallel
from fp8lm.parallel.pipeline import Pipeline
from fp8lm.telemetry.observing import ModelObserver, linears_of
from fp8lm.telemetry.table import StatisticsTable, as_metrics
from fp8lm.training.step import StepResult
from fp8lm.training.trainer import STEP, Trainer, TrainerHook


class TelemetryHook(TrainerHook):
    """Observes every `interval`-th step; all others run as without it."""

    _observer: ModelObserver
    _table: StatisticsTable

    def __init__(self, interval: int) -> None:
        self._interval = interval

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """See `TrainerHook`; a collective of the pipeline's stages."""
        run, logging = trainer.run, trainer.run.config.logging
        parallel, pipeline = run.data_parallel, run.pipeline
        self._observer = ModelObserver(
            linears_of(run.chunks),
            run.optimizer,
            run.optimizer.kernels,
            logging.fp8_stats_layers,
            buckets=parallel.buckets if isinstance(parallel, BucketedDataParallel) else None,
            pipeline=(pipeline.stage, pipeline.wire) if isinstance(pipeline, Pipeline) else None,
            what_if=logging.fp8_stats_what_if,
        )
        stages = from_all(run.groups.pipeline_parallel, self._observer.rows)
        rows = dict.fromkeys(row for stage in stages for row in stage)
        self._table = StatisticsTable(list(rows), run.device)
        yield

    def phase(self, trainer: Trainer, name: str) -> AbstractContextManager[None]:
        """See `TrainerHook`."""
        if name == STEP and (trainer.progress.iteration + 1) % self._interval == 0:
            return self._observing(trainer)
        return nullcontext()

    @contextmanager
    def _observing(self, trainer: Trainer) -> Iterator[None]:
        with trainer.run.pipeline.without_graphs(), self._observer.observing(self._table):
            yield

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """See `TrainerHook`."""
        if not trainer.due(self._interval):
            return
        run, guard = trainer.run, trainer.guard
        statistics = self._table.collect(run.groups.world)
        for line in [] if guard is None else guard.check(statistics):
            trainer.say(f"{line} (iteration {trainer.progress.iteration})")
        metrics = as_metrics(statistics, None if guard is None else guard.in_bf16)
        for hook in trainer.hooks:
            hook.on_metrics(trainer, metrics)
