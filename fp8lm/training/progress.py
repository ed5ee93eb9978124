"""How far a run is, and the sums its next report will average."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.training.step import StepResult


@dataclass
class Progress:
    """Iterations done, samples consumed over all ranks, and samples of the last iteration.

    `skipped_samples` were passed over in `rollbacks` from loss spikes: the data are that far ahead
    of what is consumed.
    """

    iteration: int = 0
    consumed_samples: int = 0
    batch_size: int = 0
    skipped_samples: int = 0
    rollbacks: int = 0

    def advance(self, consumed_samples: int) -> None:
        """Count one iteration, after which `consumed_samples` are consumed."""
        self.iteration += 1
        self.batch_size = consumed_samples - self.consumed_samples
        self.consumed_samples = consumed_samples


@dataclass(frozen=True)
class Interval:
    """What passed between two reports."""

    iterations: int
    samples: int
    seconds: float


class Stopwatch:
    """Measures training between reports, without what happens while it is paused."""

    def __init__(self, progress: Progress) -> None:
        self._start(progress)

    def interval(self, progress: Progress) -> Interval:
        """What passed since the last lap; starts the next."""
        interval = Interval(
            progress.iteration - self._iteration,
            progress.consumed_samples - self._samples,
            time.perf_counter() - self._started,
        )
        self._start(progress)
        return interval

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop for the duration of a `with` block."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def _start(self, progress: Progress) -> None:
        self._iteration, self._samples = progress.iteration, progress.consumed_samples
        self._started = time.perf_counter()


class MetricAccumulator:
    """Sums since the last report, kept on the device.

    They are part of a checkpoint, so that a resumed run reports the same averages.
    """

    FIELDS = ("loss", "steps", "skipped", "nan", "skipped_in_a_row")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.FIELDS), dtype=torch.float64, device=device)

    def add(self, result: StepResult) -> None:
        """Count one step; one that is skipped, or of whose tokens none counts, has no loss."""
        skipped = result.skipped.double()
        has_loss = ~result.skipped & (result.share > 0)
        loss = torch.where(has_loss, result.loss, torch.zeros_like(result.loss)).double()
        nan = torch.isnan(result.loss).double()
        self.sums[:4] += torch.stack((loss, has_loss.double(), skipped, nan))
        self.sums[4] = (self.sums[4] + 1.0) * skipped

    @property
    def skipped_in_a_row(self) -> Tensor:
        """0-d, on the device."""
        return self.sums[4]

    def read(self) -> dict[str, float]:
        """Values by field (a host synchronisation); then starts over."""
        values = dict(zip(self.FIELDS, self.sums.tolist(), strict=True))
        self.sums[:4] = 0.0
        return values
