"""What kernels have found about the last few tensors, for whoever reads these next.

A kernel that makes or casts a tensor can reduce it in passing. Who wants the result is often
another layer, with autograd in between, which hands on the tensor and nothing beside it.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memo:
    """A fact (a tensor) about each of the last `length` tensors.

    It is one about the memory: a view of all of it has it too, whatever its shape. It is forgotten
    when the memory is written to, or freed. No tensor is kept alive but the facts.
    """

    def __init__(self, length: int) -> None:
        self._known: deque[tuple[StorageWeakRef, int, Tensor]] = deque(maxlen=length)

    def remember(self, x: Tensor, fact: Tensor) -> Tensor:
        """Note `fact` about `x`; returns `x`. A part of a larger memory is not noted."""
        if _is_whole(x):
            self._known.appendleft((_memory(x), x._version, fact))  # noqa: SLF001 (no public one)
        return x

    def recall(self, x: Tensor) -> Tensor | None:
        """What was noted about `x`."""
        if not _is_whole(x):
            return None
        memory, version = _memory(x), x._version  # noqa: SLF001
        noted = (f for known, of, f in self._known if known == memory and of == version)
        return next(noted, None)


def _is_whole(x: Tensor) -> bool:
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _memory(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())
