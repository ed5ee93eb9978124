"""Reports of a run: log lines, metrics.jsonl, TensorBoard and wandb, from the main process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fp8lm.config import LoggingConfig
from fp8lm.config.yaml_format import to_yaml
from fp8lm.metrics.console import Console, evaluation_line, training_line
from fp8lm.metrics.metrics_file import MetricsFile
from fp8lm.metrics.tensorboard_file import TensorBoard
from fp8lm.metrics.trackers import BestEffortTracker
from fp8lm.metrics.wandb_run import WandB

UNWRITTEN = "unwritten.log"  # lines that stdout did not take


@dataclass(frozen=True)
class RunInfo:
    """Facts of a run that reports need.

    `first_iteration` is the one a resumed run was saved at, 0 for a new one; `is_main` says
    whether this process reports; `config` is the resolved config and `facts` are what else should
    be known of the run (versions, state of the source), both kept by the trackers. `may_write` says
    whether the folder is still this run's: what is not written for that is lost.
    """

    total_iterations: int
    first_iteration: int = 0
    is_main: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    may_write: Callable[[], bool] = lambda: True


class TrainLogger:
    """Writes reports to wherever `config` says; silent in a process that is not the main one.

    Raises `InputError` if `config.dir` cannot be written to.
    """

    def __init__(self, config: LoggingConfig, run: RunInfo, stream: TextIO | None = None) -> None:
        self._run = run
        self._console = self._file = None
        self._trackers: list[BestEffortTracker] = []
        if not run.is_main:
            return
        if config.dir is not None:
            folder = Path(config.dir)
            self._file = MetricsFile(folder, run.first_iteration)
            if config.tensorboard:
                self._trackers.append(_tensorboard(folder / "tensorboard", run))
        if config.wandb_project is not None:
            self._trackers.append(_wandb(config, run))
        aside = None if config.dir is None else Path(config.dir, UNWRITTEN)
        self._console = Console(run.total_iterations, run.first_iteration, stream, aside)

    def rewind(self, iteration: int) -> None:
        """Discard reports of later iterations."""
        if self._console is not None:
            self._console.rewind(iteration)
        if not self._run.may_write():
            return
        if self._file is not None:
            self._file.rewind(iteration)
        for tracker in self._trackers:
            tracker.rewind(iteration)

    def __enter__(self) -> TrainLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def advance(self) -> None:
        """Move the progress bar by one iteration."""
        if self._console is not None:
            self._console.advance()

    def log_step(self, values: Mapping[str, float]) -> None:
        """Report the iterations since the last report, keyed as in metrics.jsonl.

        `values` has `iteration`, `consumed_samples`, `iteration-time` (seconds), `throughput`
        (TFLOP/s/GPU), `learning-rate`, `batch-size`, `lm loss`, `grad-norm`, `skipped iterations`,
        `nan iterations`, and whatever else is to be recorded.
        """
        if self._console is not None:
            self._console.write(training_line(values, self._run.total_iterations))
            self._record(values)

    def log_validation(self, iteration: int, loss: float, split: str = "validation") -> None:
        """Report the mean loss (nats per token) of an evaluation on `split`."""
        if self._console is not None:
            self._console.write(evaluation_line(split, iteration, loss))
            self._record({"iteration": iteration, f"lm loss {split}": loss})

    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record numbers of `iteration` that are not printed."""
        if self._console is not None:
            self._record({"iteration": iteration, **metrics})

    def log_text(self, line: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self._console is not None:
            self._console.write(line)

    def close(self, failed: bool = False) -> None:
        """Finish all files and trackers; `failed` if the training ended in an error."""
        if self._console is not None:
            self._console.close()
        if self._file is not None:
            self._file.close(self._run.may_write())
        for tracker in self._trackers:
            tracker.close(failed)
        self._console = self._file = None
        self._trackers = []

    def _record(self, values: Mapping[str, float]) -> None:
        if not self._run.may_write():
            return
        if self._file is not None:
            self._file.write({**values, "timestamp": time.time()})
        numbers = {key: value for key, value in values.items() if key != "iteration"}
        for tracker in self._trackers:
            tracker.log(numbers, int(values["iteration"]))


def _tensorboard(folder: Path, run: RunInfo) -> BestEffortTracker:
    def start() -> TensorBoard:
        texts = {"config": to_yaml(dict(run.config)), "facts": to_yaml(dict(run.facts))}
        return TensorBoard(folder, run.first_iteration, texts)

    return BestEffortTracker("TensorBoard", start)


def _wandb(config: LoggingConfig, run: RunInfo) -> BestEffortTracker:
    return BestEffortTracker(
        "wandb", lambda: WandB(config, run.config, run.first_iteration, run.facts)
    )
