"""Bytes of the tensors that are alive."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8lm.training.memory import live_tensor_bytes


def test_memory_is_counted_once_and_while_it_is_held():
    before = live_tensor_bytes()
    whole = torch.zeros(1000)
    parts = [whole[:10], whole.view(10, 100).T, torch.nn.Parameter(whole)]
    assert live_tensor_bytes() - before == whole.nbytes
    del whole, parts
    assert live_tensor_bytes() == before


@pytest.mark.parametrize("sizes", [(7, 100), (100, 7)])
def test_tensors_without_memory_do_not_count(sizes):
    """All of them are at address 0, where the order of objects would decide whose size it has."""
    before = live_tensor_bytes()
    with FakeTensorMode():
        fake = [torch.zeros(size) for size in sizes]
    meta = [torch.zeros(size, device="meta") for size in sizes]
    assert live_tensor_bytes() == before
    del fake, meta
