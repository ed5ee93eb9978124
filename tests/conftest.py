"""What every test shares: processes to run on, and no tests marked `gpu` without CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pool import Pools


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
