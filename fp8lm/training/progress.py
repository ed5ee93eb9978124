"""Progress of a run, metrics accumulated between reports, and the scalars of every step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.training.step import StepResult


@dataclass
class Progress:
    """Iterations done, samples consumed over all ranks, and samples of the last iteration.

    `skipped_samples` were skipped in `rollbacks` from loss spikes: the data position is that far
    ahead of `consumed_samples`.
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
    """Time, iterations and samples between two reports."""

    iterations: int
    samples: int
    seconds: float


class Stopwatch:
    """Measures training between reports, without what happens while it is paused."""

    def __init__(self) -> None:
        self._iteration = self._samples = 0
        self._started, self._runs = 0.0, False

    def start(self, progress: Progress) -> None:
        """Begin an interval, unless one has begun."""
        if not self._runs:
            self._begin(progress)

    def reset(self) -> None:
        """Forget the interval."""
        self._runs = False

    def interval(self, progress: Progress) -> Interval:
        """End the interval, return it, and begin the next."""
        interval = Interval(
            progress.iteration - self._iteration,
            progress.consumed_samples - self._samples,
            time.perf_counter() - self._started,
        )
        self._begin(progress)
        return interval

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop for the duration of a `with` block."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def _begin(self, progress: Progress) -> None:
        self._runs = True
        self._iteration, self._samples = progress.iteration, progress.consumed_samples
        self._started = time.perf_counter()


class MetricAccumulator:
    """Sums since the last report, kept on the device.

    They are part of a checkpoint, so that a resumed run reports the same averages. `metrics` are
    the names of those of the objective.
    """

    FIELDS = ("loss", "steps", "skipped", "nan", "skipped_in_a_row")

    def __init__(self, device: torch.device, metrics: Sequence[str] = ()) -> None:
        self.metrics = tuple(metrics)
        size = len(self.FIELDS) + len(self.metrics)
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, result: StepResult) -> None:
        """Count one step; a skipped one, or one without counted tokens, has no loss."""
        skipped = result.skipped.double()
        has_loss = ~result.skipped & (result.share > 0)
        loss = torch.where(has_loss, result.loss, torch.zeros_like(result.loss)).double()
        nan = torch.isnan(result.loss).double()
        self.sums[:4] += torch.stack((loss, has_loss.double(), skipped, nan))
        self.sums[4] = (self.sums[4] + 1.0) * skipped
        if self.metrics:
            values = torch.stack([result.metrics[name] for name in self.metrics]).double()
            self.sums[5:] += torch.where(has_loss, values, torch.zeros_like(values))

    @property
    def skipped_in_a_row(self) -> Tensor:
        """0-d, on the device."""
        return self.sums[4]

    def read(self) -> dict[str, float]:
        """Values by field (a host synchronisation); then starts over."""
        values = dict(zip((*self.FIELDS, *self.metrics), self.sums.tolist(), strict=True))
        self.sums[:4] = 0.0
        self.sums[5:] = 0.0
        return values


@dataclass(frozen=True)
class HostScalars:
    """Scalars of a step on the host: `loss`, number of consecutive skipped steps, `stop` reason.

    `loss` is NaN where no token counts; `stop` is the largest reason of any rank (0: none).
    """

    iteration: int
    loss: float
    skipped_in_a_row: float
    stop: float


class AsyncScalars:
    """A few numbers per step, in order: on a CPU at once, on a GPU one step later.

    On a GPU the host runs ahead of the device, so `push` returns the numbers of the previous step
    instead of waiting for this one's. All ranks see the same step at the same time.
    """

    def __init__(self) -> None:
        self._arriving: tuple[int, Tensor, torch.cuda.Event] | None = None

    def push(self, iteration: int, numbers: Tensor) -> tuple[int, list[float]] | None:
        """Push the numbers of `iteration` (1-d); returns the next available ones, if any."""
        if numbers.device.type != "cuda":
            return iteration, numbers.tolist()
        arrived = self.drain()
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving = iteration, host, event
        return arrived

    def drain(self) -> tuple[int, list[float]] | None:
        """Wait for all numbers not returned yet."""
        if self._arriving is None:
            return None
        iteration, host, event = self._arriving
        self._arriving = None
        event.synchronize()
        return iteration, host.tolist()
