"""Checkpoints written synchronously or in the background.

    save       copy to host memory (if asynchronous) and start writing
    collect    outcomes of finished saves, without waiting for the others

One checkpoint is written at a time: a `save` waits for the previous one. The writing threads
communicate over a process group of their own, since the main threads are training. A slow file may
block that group for hours, so its timeout is long and does not detect a dead rank: the threads that
wait for the writing poll over the training's own group, whose timeout is short.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.checkpoint.collectives import Group, from_all
from fp8lm.checkpoint.files import Retention
from fp8lm.checkpoint.host_arena import HostArena, lock_pages, unlock_pages
from fp8lm.checkpoint.resharding import ShardKey, Shards, ShardSavePlanner
from fp8lm.checkpoint.saving import RetentionError, SaveError, save_checkpoint
from fp8lm.checkpoint.shard import Shard
from fp8lm.runtime.errors import LockLost
from fp8lm.runtime.run_lock import RunLocks

SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 1.0  # seconds between two polls of waiting ranks


@dataclass(frozen=True)
class Outcome:
    """Outcome of one save: iteration, duration, and the error if it failed.

    The error is `LockLost` if another run has taken over the folder. `seconds` is the time of
    writing, not the time for which training was blocked.
    """

    iteration: int
    seconds: float
    error: SaveError | LockLost | None = None

    @property
    def written(self) -> bool:
        """Whether the checkpoint is on disk, even if deleting older ones failed."""
        return self.error is None or isinstance(self.error, RetentionError)


class CheckpointSaver:
    """Writes the checkpoints of one run to `root`; all ranks of `group` call together.

    `asynchronous`: `save` returns once the tensors are copied to host memory, as many bytes as this
    rank writes; else once they are on disk. `locks`: of the run, on the main rank; they are kept
    while a checkpoint is being written. `files` are kept in each checkpoint. `training_group` has
    the same ranks and the timeout after which a waiting rank fails if another is gone.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        group: Group,
        *,
        asynchronous: bool = False,
        retention: Retention = Retention(),  # noqa: B008 (frozen)
        locks: RunLocks | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
        training_group: Group = None,
    ) -> None:
        self.root = Path(root)
        self._group, self._retention, self._files = group, retention, files
        self._locks = RunLocks() if locks is None else locks
        self._copies = HostCopies(arena_for_gpu()) if asynchronous else None
        self._training_group = training_group
        self._alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        beside = asynchronous or not self._alone
        self._writer = _writer_thread() if beside else None
        self._writing: Future[Outcome] | None = None
        self._outcomes: list[Outcome] = []

    def save(self, iteration: int, shards: Shards, meta: Mapping[str, Any]) -> None:
        """Start a save; `collect` returns its outcome."""
        self.wait()
        if self._writer is None:
            self._outcomes.append(self._write(iteration, ShardSavePlanner(shards), meta))
            return
        if self._copies is None:
            planner = ShardSavePlanner(shards)
            self._writing = self._writer.submit(self._write, iteration, planner, meta)
            self.wait()
            return
        copies = self._copies
        planner = copies.copy(shards)

        def write() -> Outcome:
            planner.wait()
            outcome = self._write(iteration, planner, meta)
            if outcome.written:
                copies.learn(planner)  # a failed save may have no plan
            return outcome

        self._writing = self._writer.submit(write)
        self._locks.keep_until(self._writing)

    def collect(self) -> list[Outcome]:
        """Outcomes of saves that have finished since the last call."""
        if self._writing is not None and self._writing.done():
            self._take_outcome()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def wait(self) -> None:
        """Wait until no rank is writing; fails if one cannot be reached."""
        pause = SHORTEST_PAUSE
        while not self._all_done():
            wait_for([self._writing] if self._writing is not None else [], pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._take_outcome()

    def _all_done(self) -> bool:
        done = self._writing is None or self._writing.done()
        return done if self._alone else all(from_all(self._training_group, done))

    def _take_outcome(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._outcomes.append(writing.result())

    def close(self) -> None:
        """Wait for the current save and stop the writer."""
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()

    def _write(self, iteration: int, planner: ShardSavePlanner, meta: Mapping[str, Any]) -> Outcome:
        started, error = time.perf_counter(), None
        try:
            rules = self._retention, self._locks.verify, self._files
            save_checkpoint(self.root, iteration, planner, meta, self._group, *rules)
        except (SaveError, LockLost) as failure:
            error = failure
        return Outcome(iteration, time.perf_counter() - started, error)


class HostCopies:
    """Copies the blocks that this rank writes, and only those.

    Replicas hold the same blocks, and each block is written once. Who writes which block depends on
    the shapes alone, so the plan of the first checkpoint holds for all later ones. These use
    `arena`, if there is one; the first, which copies all blocks, takes memory of its own.
    """

    def __init__(self, arena: HostArena | None = None) -> None:
        self._written: Collection[ShardKey] | None = None
        self._arena = arena

    def copy(self, shards: Shards) -> CopiedPlanner:
        """A planner over copies of `shards` in host memory; wait for it before reading them.

        On a GPU the copies are ordered before whatever the current stream does next, and from the
        second save on the host does not wait for them. Copies of an earlier call are overwritten.
        """
        written = {
            (name, tuple(block.offset)): block.tensor.detach()
            for name, blocks in shards.items()
            for block in blocks
            if self._written is None or (name, tuple(block.offset)) in self._written
        }
        copied = dict(zip(written, self._copied(list(written.values())), strict=True))
        copies: dict[str, list[Shard]] = {}
        for name, blocks in shards.items():
            copies[name] = []
            for block in blocks:
                copy = copied.get((name, tuple(block.offset)))
                absent = torch.empty_like(block.tensor, device="meta") if copy is None else copy
                copies[name].append(replace(block, tensor=absent))
        event = None
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
        return CopiedPlanner(copies, event)

    def learn(self, planner: ShardSavePlanner) -> None:
        """Remember what this rank wrote."""
        self._written = planner.written

    def _copied(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._arena is None or self._written is None:
            return [tensor.to("cpu", copy=True) for tensor in tensors]
        hosts = self._arena.take(tensors)
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        return hosts


class CopiedPlanner(ShardSavePlanner):
    """Plans the writing of copies, which may still be arriving from a GPU until `wait`."""

    def __init__(self, copies: Mapping[str, list[Shard]], event: torch.cuda.Event | None) -> None:
        super().__init__(copies)
        self._event = event

    def wait(self) -> None:
        """Return when all copies are there."""
        if self._event is not None:
            self._event.synchronize()


def arena_for_gpu() -> HostArena | None:
    """Where a GPU's tensors are copied to; None where training is on the CPU."""
    return HostArena(lock_pages, unlock_pages) if torch.cuda.is_initialized() else None


def _writer_thread() -> ThreadPoolExecutor:
    """A thread whose current GPU is this process's: by default it would be the machine's first."""
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1, "checkpoint")
    device = (torch.cuda.current_device(),)
    return ThreadPoolExecutor(1, "checkpoint", initializer=torch.cuda.set_device, initargs=device)
