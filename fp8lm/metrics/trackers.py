"""Experiment trackers, under the keys of metrics.jsonl; none of them ever stops a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from fp8lm.runtime.streams import warn


class Tracker(Protocol):
    """An experiment tracker; any of its methods may fail."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Keep the values of one iteration."""

    def rewind(self, iteration: int) -> None:
        """What was kept of later iterations is not valid any more."""

    def close(self, failed: bool) -> None:
        """Finish; `failed` if the training ended in an error."""


class BestEffortTracker:
    """A tracker whose first failure is one warning, after which the run goes on without it."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name, self._tracker = name, None
        try:
            self._tracker = start()
        except Exception as error:
            self._let_go("start", error)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Keep the values of one iteration."""
        if self._tracker is not None:
            try:
                self._tracker.log(values, iteration)
            except Exception as error:
                self._let_go("go on", error)

    def rewind(self, iteration: int) -> None:
        """What was kept of later iterations is not valid any more."""
        if self._tracker is not None:
            try:
                self._tracker.rewind(iteration)
            except Exception as error:
                self._let_go("go back", error)

    def close(self, failed: bool) -> None:
        """Finish."""
        if self._tracker is not None:
            try:
                self._tracker.close(failed)
            except Exception as error:
                self._let_go("finish", error)

    def _let_go(self, action: str, error: Exception) -> None:
        self._tracker = None
        warn(f"going on without {self._name}, which could not {action}: {error!r}")
