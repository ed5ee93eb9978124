"""Loss spikes: a loss that stays far above its running mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8lm.checkpoint import Checkpoint

MEMORY = 100  # steps that the running mean remembers, about
STATE = ("mean", "steps", "high", "first")


class LossSpike(Exception):
    """The loss has left its running `mean` with iteration `first`."""

    def __init__(self, first: int, mean: float, loss: float) -> None:
        super().__init__(f"loss spike at iteration {first}: {loss:.4f} after a mean of {mean:.4f}")
        self.first = first


class RollBack(Exception):
    """The answer to `spike`: the run goes back to `checkpoint`."""

    def __init__(self, spike: LossSpike, checkpoint: Checkpoint) -> None:
        super().__init__(f"{spike}: back to iteration {checkpoint.iteration}")
        self.spike, self.checkpoint = spike, checkpoint


@dataclass
class LossSpikeDetector:
    """Detects a spike: `patience` losses in a row more than `threshold` nats above the mean.

    `mean` of `steps`, `high` losses in a row and the `first` iteration of them are its state, part
    of a checkpoint. A loss that is too high does not enter the mean, and one that is not finite
    belongs to a skipped step, which changes nothing.
    """

    threshold: float | None
    patience: int
    mean: float = 0.0
    steps: int = 0
    high: int = 0
    first: int = 0

    def add(self, iteration: int, loss: float) -> None:
        """Take the loss of one step; raises `LossSpike`."""
        if self.threshold is None or not math.isfinite(loss):
            return
        if self.steps and loss > self.mean + self.threshold:
            self.first = self.first if self.high else iteration
            self.high += 1
            if self.high >= self.patience:
                raise LossSpike(self.first, self.mean, loss)
            return
        self.high = 0
        self.steps = min(self.steps + 1, MEMORY)
        self.mean += (loss - self.mean) / self.steps

    def forget(self) -> None:
        """Reset: take the next loss as the mean."""
        self.mean, self.steps, self.high = 0.0, 0, 0

    @property
    def state(self) -> dict[str, float]:
        """The state, for a checkpoint."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, float]) -> None:
        """Resume from `state`."""
        for name in STATE:
            setattr(self, name, state[name])
