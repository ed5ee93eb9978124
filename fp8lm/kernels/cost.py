"""What a kernel that PyTorch does not know reads and writes, for tools that count a step's bytes.

A dispatch mode sees the operations of PyTorch, and none of a Triton kernel. So the launcher of such
kernels declares each launch to the recorder of the calling context, if there is one; on the meta
device, which has nothing to launch on, that is all it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class CostRecorder(Protocol):
    """Gets every launch of a kernel while it is the recorder of the context (`recording`)."""

    def record(self, name: str, reads: int, writes: int) -> None:
        """One launch of the kernel `name`; `reads` and `writes` are bytes of device memory."""


_recorder: ContextVar[CostRecorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(recorder: CostRecorder) -> Iterator[None]:
    """Declare the launches of this context to `recorder`, and to no outer one."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def declare_launch(name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """Tell the recorder, if there is one, of a launch that reads and writes each tensor once.

    A tensor that is updated in place is in both; one that is read twice is in `reads` twice.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.record(name, _bytes(reads), _bytes(writes))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
