"""One buffer of page-locked host memory, to which a GPU's tensors are copied for every checkpoint.

PyTorch's allocator of such memory rounds each tensor up to a power of two, up to twice the bytes,
and locking pages stops the device and takes seconds for many gigabytes. This is as large as the
tensors, and is locked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: of any dtype, and of a processor's cache lines


class HostArena:
    """`lock` locks the pages of a buffer (uint8), `unlock` lets them go before it is freed."""

    def __init__(self, lock: Callable[[Tensor], None], unlock: Callable[[Tensor], None]) -> None:
        self._lock, self._unlock = lock, unlock
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous tensors of the shapes and dtypes of `like`, side by side in host memory.

        They are the same memory at every call: those of the last must not be in use any more.
        """
        starts = list(accumulate((_aligned(tensor.nbytes) for tensor in like), initial=0))
        if starts[-1] > self._buffer.nbytes:
            self._replace(starts[-1])
        return [self._part(start, x) for start, x in zip(starts, like, strict=False)]

    def _part(self, start: int, like: Tensor) -> Tensor:
        if not like.nbytes:
            return torch.empty_like(like, device="cpu")
        # A storage of its own: who writes a tensor to a file copies it if it is part of a larger.
        memory = self._buffer.numpy()
        part = torch.frombuffer(memory, dtype=torch.uint8, count=like.nbytes, offset=start)
        return part.view(like.dtype).view(like.shape)

    def _replace(self, num_bytes: int) -> None:
        if self._buffer.nbytes:
            self._unlock(self._buffer)
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._lock(self._buffer)


def lock_pages(buffer: Tensor) -> None:
    """Lock the pages of `buffer` for copies that do not stop the host; RuntimeError if refused."""
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))


def unlock_pages(buffer: Tensor) -> None:
    """Undo `lock_pages`."""
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
