from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import time
import weakref
from multiprocessing import resource_sharer
from unittest.mock import Mock

import pytest
import torch
from torch.utils import data
from torch.utils.data import Dataset

from fp8lm.data import batches
from fp8lm.data.batches import BatchIterator
from fp8lm.data.datasets import build_datasets
from fp8lm.runtime.errors import EXIT_FAILED, InputError, run_command


class Numbered(Dataset):
    """Item i holds i in every place."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        tokens = torch.full((4,), i)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(4), "dataset_id": 0}


class Failing(Numbered):
    """Items from 4 on do what `fail` does."""

    def __init__(self, fail):
        super().__init__(48)
        self.fail = fail

    def __getitem__(self, i):
        if i >= 4:
            self.fail()
        return super().__getitem__(i)


def iterate(size=48, rank=0, world_size=1, consumed_samples=0, num_workers=0, micro=2, **more):
    return BatchIterator(
        more.pop("dataset", Numbered(size)),
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        consumed_samples=consumed_samples,
        num_workers=num_workers,
        **more,
    )


def samples(batches):
    return [batch.tokens[:, 0].tolist() for batch in batches]


def test_ranks_take_turns_as_in_megatron():
    assert samples(iterate(rank=0, world_size=2).next(2)) == [[0, 1], [4, 5]]
    assert samples(iterate(rank=1, world_size=2).next(2)) == [[2, 3], [6, 7]]


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_are_numbered(rank):
    batches = iterate(rank=rank, world_size=2, consumed_samples=8).next(3)
    for batch in batches:
        assert batch.sample_ids.tolist() == batch.tokens[:, 0].tolist()


def test_batches_are_stacked_fields():
    (batch,) = iterate().next(1)
    found = {key: value for key, value in vars(batch).items() if value is not None}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in found.items()} == {
        "tokens": (torch.int64, (2, 4)),
        "labels": (torch.int64, (2, 4)),
        "loss_mask": (torch.float32, (2, 4)),
        "sample_ids": (torch.int64, (2,)),
    }


class Positioned(Numbered):
    """Items that have positions of their own."""

    def __getitem__(self, i):
        return super().__getitem__(i) | {"position_ids": torch.arange(4) % 3}


def test_positions_are_those_of_the_items():
    (batch,) = iterate(dataset=Positioned(48)).next(1)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0]] * 2
    assert batch.documents is None
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if value is not None]
    assert len(tensors) == 5 and {value.device.type for value in tensors} == {"meta"}


class InOrder(Numbered):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"position_ids": torch.arange(4)}


def test_positions_in_order_are_the_models_own():
    (batch,) = iterate(dataset=InOrder(48)).next(1)
    assert batch.position_ids is None


class OfDocuments(Numbered):
    """Items of one document each, and of two."""

    def __getitem__(self, i):
        starts = [0, 0, 2, 2] if i % 2 else [0, 0, 0, 0]
        return super().__getitem__(i) | {"document_starts": torch.tensor(starts)}


def test_documents_of_a_micro_batch():
    (batch,) = iterate(dataset=OfDocuments(48)).next(1)
    documents = batch.documents.to(torch.device("cpu"))
    assert documents.starts.tolist() == [[0, 0, 0, 0], [0, 0, 2, 2]]
    assert documents.cu_seqlens.tolist() == [0, 4, 6, 8] and documents.max_seqlen == 4
    assert documents.cu_seqlens.dtype == torch.int32
    moved = batch.to(torch.device("meta")).documents
    assert moved.starts.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.max_seqlen == 4


def test_samples_of_one_document_need_no_mask():
    (batch,) = iterate(dataset=OfDocuments(48), micro=1).next(1)
    assert batch.documents is None


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_equals_uninterrupted_while_the_batch_grows(num_workers, world_size):
    steps = [1, 1, 2, 3, 3]
    whole = iterate(world_size=world_size, rank=world_size - 1)
    expected = [samples(whole.next(step)) for step in steps]
    consumed = sum(steps[:3]) * 2 * world_size
    resumed = iterate(
        world_size=world_size,
        rank=world_size - 1,
        consumed_samples=consumed,
        num_workers=num_workers,
    )
    assert [samples(resumed.next(step)) for step in steps[3:]] == expected[3:]
    assert resumed.consumed_samples == whole.consumed_samples == sum(steps) * 2 * world_size


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_rng_is_left_alone(num_workers):
    before = torch.get_rng_state()
    iterate(num_workers=num_workers).next(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_running_out_is_an_error_before_anything_is_taken():
    batches = iterate(size=9)  # the ninth sample is no whole micro-batch
    batches.next(3)
    with pytest.raises(InputError, match="9 samples are used up: 6 consumed, 4 wanted"):
        batches.next(2)
    assert samples(batches.next(1)) == [[6, 7]]


def test_beyond_the_end_there_is_nothing():
    with pytest.raises(InputError, match="used up"):
        iterate(size=4, consumed_samples=10).next(1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_megatrons_dataset_through_the_iterator(
    make_config, tokenizer, write_documents, num_workers
):
    first = write_documents([list(range(i, i + 25)) for i in range(20)], name="first")
    second = write_documents([list(range(i, i + 9)) for i in range(20)], name="second")
    config = make_config(data_path=[1.0, first, 2.0, second], split="1")
    train, _, _ = build_datasets(config, tokenizer, (24, 0, 0))
    batches = BatchIterator(
        train,
        micro_batch_size=4,
        rank=1,
        world_size=2,
        consumed_samples=8,
        num_workers=num_workers,
    )
    (batch,) = batches.next(1)
    for row, index in enumerate(range(12, 16)):
        assert torch.equal(batch.tokens[row], train[index]["tokens"])
        assert torch.equal(batch.labels[row], train[index]["labels"])


def hang():
    time.sleep(600)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def leave():
    os._exit(3)


def refuse():
    raise InputError("P.bin: sample 4 has\na token that is none")


@contextlib.contextmanager
def shared_memory_of_at_most(size):
    """As where /dev/shm is full, shared memory cannot grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failure(fail, capsys, **more):
    """The message and exit code of a command whose workers meet `fail`."""

    def main(argv):
        with iterate(dataset=Failing(fail), num_workers=2, **more) as batches:
            batches.next(20)

    before = set(multiprocessing.active_children())  # other tests' pools stay
    code = run_command(main, [])
    assert set(multiprocessing.active_children()) <= before
    return capsys.readouterr().err, code


@pytest.mark.parametrize("fail", [hang, stop])
def test_workers_that_send_nothing_are_ended_and_named(fail, capsys):
    error, code = failure(fail, capsys, worker_timeout=0.5)
    assert code == EXIT_FAILED and error.startswith("error: ") and error.count("\n") == 1
    assert "data.worker_timeout" in error and "0.5 s" in error


@pytest.mark.parametrize("fail", [kill, leave])
def test_a_worker_that_dies_is_named(fail, capsys):
    error, code = failure(fail, capsys)
    assert code == EXIT_FAILED and error.startswith("error: ") and error.count("\n") == 1
    assert "a data worker (process " in error and "data.num_workers" in error


@pytest.mark.parametrize(
    ("broken", "number", "says"),
    [
        (ConnectionResetError, signal.SIGKILL, "was killed (Killed)"),
        (ConnectionRefusedError, signal.SIGKILL, "was killed (Killed)"),
        (FileNotFoundError, signal.SIGKILL, "was killed (Killed)"),
        (EOFError, signal.SIGBUS, "was killed by a bus error"),
    ],
)
def test_a_worker_that_dies_while_its_batch_is_fetched_is_named(
    broken, number, says, monkeypatch, capsys
):
    def fetch(self, *_):
        (worker, *_) = set(multiprocessing.active_children()) - before
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # PyTorch does not see it yet
        os.kill(worker.pid, number)
        raise broken

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(resource_sharer.DupFd, "detach", fetch)
    try:
        error, code = failure(lambda: None, capsys)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    assert code == EXIT_FAILED and error.startswith("error: ") and error.count("\n") == 1
    assert "a data worker (process " in error and says in error and "data.num_workers" in error


def test_an_error_beside_workers_that_live_is_raised(monkeypatch, capsys):
    monkeypatch.setattr(resource_sharer.DupFd, "detach", Mock(side_effect=EOFError("mine")))
    monkeypatch.setattr(batches, "END_WAIT", 0.2)
    with pytest.raises(EOFError, match="mine"):
        failure(lambda: None, capsys)


@pytest.mark.parametrize("size", [0, 40])  # for no lock between the processes, for no batch
def test_full_shared_memory_is_named_with_its_cure(size, capsys):
    with shared_memory_of_at_most(size):
        error, code = failure(lambda: None, capsys, worker_timeout=60.0)
    assert code == EXIT_FAILED and error.startswith("error: ") and error.count("\n") == 1
    assert "data.num_workers=0" in error and "--shm-size" in error and "KiB free" in error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSYS])
def test_shared_memory_that_cannot_be_used_is_named_with_its_cure(number, monkeypatch, capsys):
    def lock():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    error, code = failure(lambda: None, capsys)
    assert code == EXIT_FAILED and error.startswith("error: ") and error.count("\n") == 1
    assert f"/dev/shm: {os.strerror(number)}" in error and "data.num_workers=0" in error


def test_what_tries_the_shared_memory_leaves_all_of_it_to_the_workers(monkeypatch):
    class Tried:
        pass

    class Loader(data.DataLoader):
        def __iter__(self):
            left.append(len(locks))
            return iter(())

    locks, left = weakref.WeakSet(), []

    def lock():
        locks.add(tried := Tried())
        return tried

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    monkeypatch.setattr("fp8lm.data.batches.DataLoader", Loader)
    iterate(num_workers=1)
    assert left == [0]


def test_what_a_worker_refuses_is_said_as_by_this_process(capsys):
    error, code = failure(refuse, capsys)
    assert (error, code) == ("error: P.bin: sample 4 has a token that is none\n", 2)


def test_a_worker_that_hangs_does_not_outlive_its_iterator(monkeypatch):
    monkeypatch.setattr(data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # noqa: SLF001 (5 s)
    before = set(multiprocessing.active_children())
    with iterate(dataset=Failing(hang), num_workers=2) as batches:
        batches.next(1)
    assert set(multiprocessing.active_children()) <= before


def test_a_worker_that_dies_while_they_end_stops_nothing(monkeypatch):
    def tell_them(_event):
        (worker, *_) = set(multiprocessing.active_children()) - before
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(60)  # until PyTorch's handler of SIGCHLD raises
        raise AssertionError("nothing was raised")

    monkeypatch.setattr(data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # noqa: SLF001 (5 s)
    before = set(multiprocessing.active_children())
    with iterate(num_workers=2) as batches:
        batches.next(1)
        monkeypatch.setattr(multiprocessing.synchronize.Event, "set", tell_them)
    assert set(multiprocessing.active_children()) <= before


def test_a_limit_that_is_not_reached_changes_nothing():
    with iterate(num_workers=2, worker_timeout=60.0) as batches:
        assert samples(batches.next(3)) == samples(iterate().next(3))
