"""What every test shares: processes to run on, and no tests marked `gpu` without CUDA."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# Before anything imports Triton, which reads it then: without a GPU kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.distributed.pool import Pools


def pytest_configure():
    # What a shell runs in the background ignores Ctrl-C and hands that on; tests send it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_distributed():
    """`run_distributed(function, world_size, *args)`: see `tests.distributed.pool`."""
    with Pools() as pools:
        yield pools.run


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # a keyword may be a name as well
            item.add_marker(skip)
