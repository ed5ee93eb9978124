"""Page-locked memory of checkpoints: one buffer, no bytes shared, none more than needed."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint.host_arena import HostArena, lock_pages

LIKE = [
    torch.empty(3, 5, dtype=torch.bfloat16),
    torch.empty((), dtype=torch.float32),
    torch.empty(0, 4),
    torch.empty(129, dtype=torch.uint8),
    torch.empty(2, 2, dtype=torch.int64),
]


def test_tensors_lie_side_by_side():
    locked = []
    tensors = HostArena(locked.append, locked.remove).take(LIKE)
    for number, (tensor, like) in enumerate(zip(tensors, LIKE, strict=True)):
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        assert tensor.is_contiguous() and tensor.data_ptr() % 8 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    (buffer,) = locked
    assert buffer.nbytes <= sum(like.nbytes + 63 for like in LIKE)


def test_the_same_memory_is_used_again():
    locked = []
    arena = HostArena(locked.append, locked.remove)
    (first,) = arena.take(LIKE[:1])
    (again,) = arena.take(LIKE[:1])
    assert again.data_ptr() == first.data_ptr() and len(locked) == 1
    arena.take(LIKE)  # larger: the smaller buffer is let go
    assert [buffer.nbytes for buffer in locked] == [384]
    assert arena.take([]) == []


@pytest.mark.gpu
def test_pages_are_locked():
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    lock_pages(buffer)
    assert buffer.is_pinned()
