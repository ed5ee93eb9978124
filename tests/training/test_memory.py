"""Bytes of the tensors that are alive, in a process that has no others."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8lm.training.memory import live_tensor_bytes


def counted():
    """Bytes beside those at the start: of views, afterwards, and of tensors without memory."""
    before, found = live_tensor_bytes(), []
    whole = torch.zeros(1000)
    parts = [whole[:10], whole.view(10, 100).T, torch.nn.Parameter(whole)]
    found.append(live_tensor_bytes() - before)
    del whole, parts
    found.append(live_tensor_bytes() - before)
    for sizes in ((7, 100), (100, 7)):  # all at address 0, where the last one's size would count
        with FakeTensorMode():
            _fake = [torch.zeros(size) for size in sizes]
        _meta = [torch.zeros(size, device="meta") for size in sizes]
        found.append(live_tensor_bytes() - before)
    return found


def test_memory_is_counted_once_while_it_is_held():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(counted).result() == [4000, 0, 0, 0]
