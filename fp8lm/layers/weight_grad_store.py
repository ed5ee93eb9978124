"""Weight gradients whose computation is deferred beyond backward (zero-bubble schedules).

A linear layer's wgrad GEMM is a step of its own; a zero-bubble schedule runs it where a stage
would wait. Until then its operands, in FP8, are held; under sequence parallelism this rank's part
of the input, which is gathered when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class WeightGradStore:
    """Collects deferred weight gradients by micro-batch, until `compute` runs them."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Callable[[], None]]] = {}
        self._collecting: int | None = None

    @property
    def is_deferring(self) -> bool:
        """Whether gradients wait."""
        return self._collecting is not None

    def add(self, compute: Callable[[], None]) -> None:
        """Run `compute` now, or with the others of its micro-batch."""
        if self._collecting is not None:
            self._waiting.setdefault(self._collecting, []).append(compute)
        else:
            compute()

    @contextmanager
    def deferring(self, microbatch: int | None) -> Iterator[None]:
        """Within, gradients wait for `compute(microbatch)`; with None nothing waits."""
        self._collecting = microbatch
        try:
            yield
        finally:
            self._collecting = None

    def __len__(self) -> int:
        """Number of micro-batches whose gradients wait."""
        return len(self._waiting)

    @torch.no_grad()
    def compute(self, microbatch: int) -> None:
        """Compute the gradients deferred for it."""
        for compute in self._waiting.pop(microbatch, []):
            compute()
