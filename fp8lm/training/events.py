"""Numbers of every step on the host, without the host waiting for the step."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalars:
    """A few numbers per step, in order: on a CPU at once, on a GPU one step later.

    A GPU's step has not begun when the host has started it, so `push` returns the numbers of the
    step before, which are there by then or soon. All ranks see the same step at the same time.
    """

    def __init__(self) -> None:
        self._arriving: tuple[int, Tensor, torch.cuda.Event] | None = None

    def push(self, iteration: int, numbers: Tensor) -> tuple[int, list[float]] | None:
        """Hand over those of `iteration` (1-d); take the next there are, with their iteration."""
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
        """Wait for what has not been returned yet."""
        if self._arriving is None:
            return None
        iteration, host, event = self._arriving
        self._arriving = None
        event.synchronize()
        return iteration, host.tolist()
