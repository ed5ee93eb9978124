"""Tensors of every stored kind, as one process saves and loads them."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import torch

from fp8lm.checkpoint import Shard, load_checkpoint, open_checkpoint

LATEST = "latest_checkpointed_iteration.txt"
META = {"consumed_samples": 4800, "config": {"optimizer": {"lr": 1e-3}}}


def make_tensors(seed=0):
    """One tensor of every stored kind, every bit pattern possible (NaNs included)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape, dtype):
        raw = torch.randint(
            0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator
        )
        return raw.view(dtype).reshape(shape)

    return {
        "payload": noise((6, 5), torch.uint8),
        "half": noise((4, 3), torch.float16),
        "bf16": noise((7,), torch.bfloat16),
        "single": noise((2, 3, 4), torch.float32),
        "double": noise((3,), torch.float64),
        "steps": noise((1,), torch.int64),
        "scale": noise((), torch.float32),
        "empty": noise((0, 3), torch.float32),
    }


def shards_of(tensors):
    return {name: [Shard.whole(tensor)] for name, tensor in tensors.items()}


def load(root, tensors, iteration=None, **options):
    """Fill `tensors`; what was saved as `meta`."""
    checkpoint = open_checkpoint(root, iteration)
    load_checkpoint(checkpoint, shards_of(tensors), **options)
    return checkpoint.common


def blank(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_same_bytes(actual, expected):
    for name, tensor in expected.items():
        assert (
            actual[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        ), name


@contextmanager
def file_size_limit(num_bytes):
    """A real OSError on the write that would make a file larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
