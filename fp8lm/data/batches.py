"""Micro-batches in Megatron's order, resumable at any sample.

Sample order is the dataset's own (GPTDataset shuffles when it is built). With d data-parallel
ranks of micro-batch b, micro-batch k after `consumed_samples` c takes the samples
c + k*b*d .. c + (k+1)*b*d - 1, and rank r the r-th run of b among them. Nothing else is state:
the number of micro-batches per step may vary, and an iterator made at c continues one that
reached c.
"""

from __future__ import annotations

import errno
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fp8lm.batch import Batch, Documents
from fp8lm.runtime.errors import InputError, RunFailed
from fp8lm.runtime.faults import describe_full_shared_memory, describe_unusable_shared_memory
from fp8lm.runtime.parent_death import end_with_parent

# Of an item; but for the first three they may be missing. `document_starts` make `documents`.
FIELDS = (
    *("tokens", "labels", "loss_mask", "position_ids", "document_starts"),
    *("sequence_bounds", "reference_losses"),
)
END_WAIT = 5.0  # seconds for a worker that was killed to be gone
DEATH_POLLS = 100
# What says that shared memory is full (0: libc tells no number then), or cannot be used at all.
_FULL = (0, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS)


class SizedDataset(Dataset):
    """A dataset whose samples have numbers from 0 to its length - 1."""

    def __len__(self) -> int:
        raise NotImplementedError


class MicroBatchSampler:
    """The dataset indices of one rank, a micro-batch at a time; a last partial one is dropped.

    `skipped` samples before `start` count as taken from the end: as many are handed out again
    from the beginning, after the last.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start: int,
        skipped: int = 0,
    ) -> None:
        self.micro_batch_size, self.num_samples = micro_batch_size, num_samples
        self.stride = micro_batch_size * world_size
        self.first = start + skipped + rank * micro_batch_size
        self.count = max(0, num_samples - start) // self.stride

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.count):
            begin = self.first + k * self.stride
            yield [i % self.num_samples for i in range(begin, begin + self.micro_batch_size)]


class BatchIterator:
    """Hands out micro-batches of the items of `dataset`, dicts of `FIELDS` (see `Batch`).

    `num_workers` > 0 prefetches in that many processes, with the same result; where these send
    nothing for `worker_timeout` seconds (0: no limit), `next` raises `RunFailed`, and where one of
    them has died RuntimeError (`faults` says why). They end with `close`, or the `with` block.
    Draws no random numbers. For evaluation make one at `consumed_samples=0` each time. With
    `skipped_samples` the data are that far ahead of what is consumed; where they end, they begin
    again. `stride` is the number of samples in a micro-batch of all ranks.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        consumed_samples: int,
        skipped_samples: int = 0,
        num_workers: int = 0,
        worker_timeout: float = 0.0,
        pin_memory: bool = False,
    ) -> None:
        self.consumed_samples = consumed_samples
        self._num_samples = len(dataset)
        sampler = MicroBatchSampler(
            self._num_samples,
            micro_batch_size,
            rank,
            world_size,
            consumed_samples,
            skipped_samples,
        )
        self.stride, self._left = sampler.stride, len(sampler)
        self._samples = torch.arange(sampler.first, sampler.first + micro_batch_size)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_stack,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            # Its own generator: the loader draws a seed for its workers, and the global RNG is
            # part of what a resumed run must find unchanged.
            generator=torch.Generator(),
        )
        before = multiprocessing.active_children()
        self._iterator = _start(loader)
        self._workers = [w for w in multiprocessing.active_children() if w not in before]
        self._timeout, self._timed_out = worker_timeout, False

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, also hanging ones."""
        if not self._workers:
            return
        # By name, not by dropping the iterator: frames of an exception may still refer to it. Left
        # to itself it sends a hanging worker a SIGTERM, which that ignores, and Python's exit would
        # wait for it without end.
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            # Until it forgets them, PyTorch raises what it says of a dead one wherever it is told.
            with suppress(RuntimeError):
                self._iterator._shutdown_workers()  # noqa: SLF001
        for worker in self._workers:
            worker.kill()
            worker.join(END_WAIT)
        self._workers = []

    def next(self, num_microbatches: int) -> list[Batch]:
        """The next micro-batches of this rank; `InputError` when the dataset has too few left."""
        if num_microbatches > self._left:
            raise InputError(
                f"the dataset's {self._num_samples} samples are used up: "
                f"{self.consumed_samples} consumed, {num_microbatches * self.stride} wanted: "
                "train.train_iters or train.train_samples asks for more than was built"
            )
        batches = [self._next() for _ in range(num_microbatches)]
        self._left -= num_microbatches
        self.consumed_samples += num_microbatches * self.stride
        return batches

    def _next(self) -> Batch:
        try:
            with self._limited(), self._naming_the_dead():
                fields = next(self._iterator)
        except InputError as error:  # of a worker, with its traceback as text
            raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2]) from None
        positions = _positions(fields.pop("position_ids", None))
        documents = _documents(fields.pop("document_starts", None))
        batch = Batch(
            **fields, position_ids=positions, sample_ids=self._samples, documents=documents
        )
        self._samples = self._samples + self.stride
        return batch

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Kill the workers if the block takes too long, and say so in the error.

        PyTorch's own timeout covers one of the places where it waits for them.
        """
        timer = None
        if self._workers and self._timeout:
            timer = threading.Timer(self._timeout, self._give_up)
            timer.daemon = True
            timer.start()
        try:
            yield
        except Exception as error:
            if not self._timed_out:
                raise
            raise RunFailed(
                f"the data workers sent no batch for {self._timeout:g} s (data.worker_timeout): "
                "storage that does not answer or is slow: more data.num_workers, or a longer time"
            ) from error
        finally:
            if timer is not None:
                timer.cancel()

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        """Say what PyTorch says of a dead worker where its connection breaks before that sees it.

        A batch is fetched from the worker's own server, which is gone with it.
        """
        try:
            yield
        except (EOFError, OSError):
            # By asking, as its handler of SIGCHLD does: joining would race with that for the end.
            for _ in range(DEATH_POLLS if self._workers else 0):
                signal_handling._error_if_any_worker_fails()  # noqa: SLF001
                time.sleep(END_WAIT / DEATH_POLLS)
            raise

    def _give_up(self) -> None:
        self._timed_out = True
        for worker in self._workers:
            worker.kill()  # which ends the wait for them, wherever it is


def _start(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    if loader.num_workers:
        _try_locks(4 * loader.num_workers + 8)  # about as many as there will be
    return iter(loader)


def _try_locks(count: int) -> None:
    """Make `count` locks of processes and give them back; `RunFailed` where that cannot be.

    An iterator that fails at one of its own leaves a traceback of its half-made self behind.
    """
    try:
        _locks = [multiprocessing.Lock() for _ in range(count)]
    except OSError as error:
        if error.errno in _FULL:
            raise RunFailed(describe_full_shared_memory()) from error
        if error.errno in _UNUSABLE:
            raise RunFailed(describe_unusable_shared_memory(error)) from error
        raise


def _stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    # In a worker this stacks in shared memory, and says so if that is full. The queue's own thread,
    # which would move the batch there, loses the error with the batch.
    fields = [field for field in FIELDS if field in items[0]]
    return default_collate([{field: item[field] for field in fields} for item in items])


def _positions(position_ids_BS: torch.Tensor | None) -> torch.Tensor | None:
    """None where all samples count from 0 to their end, as the model does by itself."""
    if position_ids_BS is None:
        return None
    in_order = torch.arange(position_ids_BS.shape[1])
    return None if (position_ids_BS == in_order).all() else position_ids_BS


def _documents(starts_BS: torch.Tensor | None) -> Documents | None:
    """None where every sample is one document: causal attention then needs no mask."""
    if starts_BS is None:
        return None
    documents = Documents.from_starts(starts_BS)
    return None if documents.is_one_per_sample else documents


def _begin_worker(_worker: int) -> None:
    end_with_parent()  # even where it is stopped or hangs
    _ignore_signals()


def _ignore_signals() -> None:
    """A terminal's Ctrl-C, and a launcher's signals, reach every process: the parent answers them.

    Were it left without the batches of its last step, it could not save. A worker ends by itself
    when its parent has.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
