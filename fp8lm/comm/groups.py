"""The process groups of a run. A group of size one is an ordinary case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fp8lm.errors import InputError

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ProcessGroups:
    """Groups this process belongs to, passed to whatever communicates."""

    world: dist.ProcessGroup
    data_parallel: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes for the whole run."""
        return self.world.rank() == 0


@contextmanager
def process_groups(device: torch.device) -> Iterator[ProcessGroups]:
    """Join the job that torchrun's environment describes, or make one of a single process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}: one process is supported: start it without torchrun"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield ProcessGroups(world=dist.group.WORLD, data_parallel=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
