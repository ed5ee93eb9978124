"""Checkpoints beside the training: the bytes of the moment they were asked for, errors told."""

from __future__ import annotations

import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8lm.checkpoint import (
    CheckpointSaver,
    Retention,
    SaveError,
    Shard,
    find_checkpoint,
    load_checkpoint,
)
from fp8lm.checkpoint import background as background_module
from fp8lm.checkpoint.files import saved_iterations
from fp8lm.checkpoint.host_arena import HostArena
from fp8lm.checkpoint.saving import save_checkpoint
from tests.checkpoint.disks import small_disk
from tests.checkpoint.tensors import (
    META,
    assert_same_bytes,
    blank,
    file_size_limit,
    load,
    make_tensors,
    shards_of,
)


@pytest.fixture
def held(monkeypatch):
    """Writing waits until the test sets the event."""
    event, save = threading.Event(), background_module.save_checkpoint

    def wait_and_save(*args):
        assert event.wait(20)
        return save(*args)

    monkeypatch.setattr(background_module, "save_checkpoint", wait_and_save)
    return event


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def change(tensors):
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8).bitwise_not_()


def test_what_is_saved_is_what_it_was(tmp_path, held):
    tensors = make_tensors()
    before = clones(tensors)
    saver = CheckpointSaver(tmp_path, None, asynchronous=True)
    saver.save(1, shards_of(tensors), META)
    change(tensors)  # training goes on while nothing is written yet
    assert saver.collect() == [] and saved_iterations(tmp_path) == []
    held.set()
    saver.wait()
    (outcome,) = saver.collect()
    assert (outcome.iteration, outcome.error) == (1, None)
    saver.save(2, shards_of(tensors), META)
    saver.close()
    for iteration, expected in ((1, before), (2, tensors)):
        loaded = blank(tensors)
        load(tmp_path, loaded, iteration)
        assert_same_bytes(loaded, expected)


def test_later_saves_share_one_buffer(tmp_path, monkeypatch):
    """As they do on a GPU; the first copies all blocks, before it is known who writes which."""
    locked = []
    arena = HostArena(locked.append, locked.remove)
    monkeypatch.setattr(background_module, "arena_for_gpu", lambda: arena)
    tensors, kept = make_tensors(), []
    saver = CheckpointSaver(tmp_path, None, asynchronous=True)
    for iteration in (1, 2, 3):
        saver.save(iteration, shards_of(tensors), META)
        kept.append(clones(tensors))
        change(tensors)
    saver.close()
    assert [outcome.error for outcome in saver.collect()] == [None] * 3
    for iteration, expected in enumerate(kept, start=1):
        loaded = blank(tensors)
        load(tmp_path, loaded, iteration)
        assert_same_bytes(loaded, expected)
    (buffer,) = locked
    assert buffer.nbytes <= sum(x.nbytes + 64 for x in tensors.values())


def test_the_next_save_waits(tmp_path, held):
    saver = CheckpointSaver(tmp_path, None, asynchronous=True, retention=Retention(keep_last=1))
    saver.save(1, shards_of(make_tensors()), META)
    threading.Timer(0.2, held.set).start()
    started = time.monotonic()
    saver.save(2, shards_of(make_tensors()), META)
    assert time.monotonic() - started > 0.15
    saver.close()
    assert [outcome.iteration for outcome in saver.collect()] == [1, 2]
    assert saved_iterations(tmp_path) == [2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_and_harms_nothing(tmp_path, asynchronous):
    tensors = make_tensors()
    saver = CheckpointSaver(tmp_path, None, asynchronous=asynchronous)
    saver.save(1, shards_of(tensors), META)
    saver.wait()
    with file_size_limit(2000):
        saver.save(2, shards_of(make_tensors(1)), META)
        saver.wait()
    saver.save(3, shards_of(tensors), META)
    saver.close()
    first, failed, last = saver.collect()
    assert first.error is None and last.error is None
    assert isinstance(failed.error, SaveError)
    assert "iteration 2" in str(failed.error) and "that of 1 is intact" in str(failed.error)
    assert saved_iterations(tmp_path) == [3, 1]
    loaded = blank(tensors)
    load(tmp_path, loaded)
    assert_same_bytes(loaded, tensors)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_did_not_come_to_a_plan(tmp_path, asynchronous):
    tensors, root = make_tensors(), tmp_path / "ck"
    saver = CheckpointSaver(root, None, asynchronous=asynchronous)
    root.write_text("a file where the folder should be")
    saver.save(1, shards_of(make_tensors(1)), META)
    saver.wait()
    root.unlink()
    for iteration in (2, 3):
        saver.save(iteration, shards_of(tensors), META)
    saver.close()
    assert [outcome.written for outcome in saver.collect()] == [False, True, True]
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)


def test_a_full_disk(tmp_path):
    tensors = {"w": torch.randint(0, 256, (200_000,), dtype=torch.uint8)}
    with small_disk(tmp_path, "500k"):
        saver = CheckpointSaver(tmp_path, None, asynchronous=True)
        for iteration in (1, 2, 3):
            saver.save(iteration, shards_of(tensors), META)
        saver.close()
        outcomes = saver.collect()
        assert [outcome.error is None for outcome in outcomes] == [True, True, False]
        assert "that of 2 is intact" in str(outcomes[2].error)
        assert saved_iterations(tmp_path) == [2, 1]
        loaded = blank(tensors)
        load(tmp_path, loaded)
        assert_same_bytes(loaded, tensors)


def replicated(root):
    """Bytes copied by each of two saves of a tensor that all ranks have, and one per rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    both, own = torch.arange(4096.0), torch.full((16,), float(rank))
    shards = {
        "both": [Shard.whole(both)],
        "own": [Shard(own, (16 * size,), (16 * rank,))],
    }
    group = dist.new_group(backend="gloo")
    saver, copied = CheckpointSaver(root, group, asynchronous=True), []

    def counting(root, iteration, planner, *rest):
        blocks = [block.tensor for held in planner.offered.values() for block in held]
        copied.append(sum(tensor.nbytes for tensor in blocks if not tensor.is_meta))
        return save_checkpoint(root, iteration, planner, *rest)

    with mock.patch.object(background_module, "save_checkpoint", counting):
        for iteration in (1, 2):
            saver.save(iteration, shards, META)
            both += 1.0  # what is not copied must not be written either
            own += 1.0
        saver.close()
    errors = [outcome.error for outcome in saver.collect()]
    target = {"both": torch.zeros(4096), "own": torch.zeros(16 * size)}
    load_checkpoint(find_checkpoint(root), {n: [Shard.whole(t)] for n, t in target.items()})
    dist.destroy_process_group(group)
    return copied, errors, target


def test_ranks_copy_only_what_they_write(run_distributed, tmp_path):
    results = run_distributed(replicated, 2, tmp_path)
    for copied, errors, target in results:
        assert errors == [None, None]
        assert copied[0] == 4096 * 4 + 64
        assert target["both"].equal(torch.arange(4096.0) + 1.0)
        assert target["own"].equal(torch.tensor([1.0] * 16 + [2.0] * 16))
    assert sorted(copied[1] for copied, _, _ in results) == [64, 4096 * 4 + 64]


def test_the_writing_thread_uses_the_gpu_of_its_process(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((device, threading.current_thread()))
    )
    saver = CheckpointSaver(tmp_path, None, asynchronous=True)
    saver.save(1, shards_of(make_tensors()), META)
    saver.wait()
    saver.close()
    ((device, thread),) = used
    assert device == 3 and thread is not threading.main_thread()
