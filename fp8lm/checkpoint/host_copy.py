"""What a checkpoint will hold, copied aside so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fp8lm.checkpoint.planners import ShardKey, Shards, ShardSavePlanner
from fp8lm.checkpoint.shard import Shard


class HostCopies:
    """Copies the blocks that this rank writes, and only those.

    Replicas hold the same blocks and each is written once. Which rank writes which depends on their
    shapes alone, so what the first checkpoint showed holds for all later ones.
    """

    def __init__(self) -> None:
        self._written: Collection[ShardKey] | None = None

    def copy(self, shards: Shards) -> CopiedPlanner:
        """A planner over copies of `shards` in host memory; wait for it before reading them.

        On a GPU the copies are ordered before whatever the current stream does next, and the host
        does not wait for them.
        """
        copies: dict[str, list[Shard]] = {}
        for name, blocks in shards.items():
            copies[name] = [
                replace(block, tensor=self._copy((name, tuple(block.offset)), block.tensor))
                for block in blocks
            ]
        event = None
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
        return CopiedPlanner(copies, event)

    def learn(self, planner: ShardSavePlanner) -> None:
        """Remember what this rank wrote."""
        self._written = planner.written

    def _copy(self, place: ShardKey, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self._written is not None and place not in self._written:
            return torch.empty_like(tensor, device="meta")
        if tensor.device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class CopiedPlanner(ShardSavePlanner):
    """Plans the writing of copies, which may still be arriving from a GPU until `wait`."""

    def __init__(self, copies: Mapping[str, list[Shard]], event: torch.cuda.Event | None) -> None:
        super().__init__(copies)
        self._event = event

    def wait(self) -> None:
        """Return when all copies are there."""
        if self._event is not None:
            self._event.synchronize()
