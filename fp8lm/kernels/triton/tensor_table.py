"""Tables on the device that tell a kernel of many tensors where they are, and which is whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TensorTable:
    """`rows` (int64 [tensors, columns]) and `owners` (int32 [programs]), on the device.

    A row has the number of the first program of its tensor, and after it what the caller says.
    `owners` is the row of every program's tensor. Both are copied to the device only where they
    differ from the last step's: the addresses of weights and states stay, and mostly those of
    gradients.
    """

    def __init__(self) -> None:
        self.rows = self.owners = torch.empty(0)
        self._rows: list[tuple[int, ...]] = []
        self._programs: list[int] = []

    def update(
        self, rows: Sequence[Sequence[int]], programs: list[int], device: torch.device
    ) -> None:
        """Set the `rows` of tensors that have `programs` programs each."""
        if programs != self._programs or device != self.owners.device:
            counts = torch.tensor(programs)
            owners = torch.repeat_interleave(torch.arange(len(programs)), counts)
            self.owners, self._programs = _to_device(owners.to(torch.int32), device), programs
            self._rows = []
        first, numbered = 0, []
        for row, count in zip(rows, programs, strict=True):
            numbered.append((first, *row))
            first += count
        if numbered != self._rows:
            self.rows, self._rows = _to_device(torch.tensor(numbered), device), numbered


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # From pageable memory a copy would make the host wait.
    table = table.pin_memory() if device.type == "cuda" else table
    return table.to(device, non_blocking=True)
