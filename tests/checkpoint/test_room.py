"""Full and failing disks: one line, nothing half-written, and the next save works."""

from __future__ import annotations

import errno
import os
import random

import pytest
import torch

from fp8lm.checkpoint import (
    CheckpointSaver,
    Retention,
    RetentionError,
    SaveError,
    find_checkpoint,
    save_checkpoint,
)
from fp8lm.checkpoint.files import saved_iterations
from fp8lm.checkpoint.room import make_room
from fp8lm.runtime.errors import LockLost
from tests.checkpoint.disks import failing_call, small_disk
from tests.checkpoint.tensors import LATEST, META, make_tensors, shards_of
from tools.hostile import flip_bit

NUM_BYTES = 200_000


def shards(value=0):
    return shards_of({"w": torch.full((NUM_BYTES,), value, dtype=torch.uint8)})


def save(root, iteration, retention=Retention()):  # noqa: B008
    save_checkpoint(root, iteration, shards(iteration % 251), META, retention=retention)


@pytest.fixture
def disk(tmp_path):
    """Room for two checkpoints and a half, which two fill."""
    with small_disk(tmp_path, "540k"):
        save(tmp_path, 10)
        save(tmp_path, 20)
        yield tmp_path


@pytest.mark.parametrize("asynchronous", [False, True])
def test_retention_recovers_a_full_disk(disk, asynchronous):
    with pytest.raises(SaveError, match="No space left"):
        save(disk, 30)
    saver = CheckpointSaver(disk, None, asynchronous=asynchronous, retention=Retention(1))
    for iteration in (30, 40, 50):
        saver.save(iteration, shards(), META)
    saver.close()
    assert [outcome.error for outcome in saver.collect()] == [None] * 3
    assert saved_iterations(disk) == [50] and find_checkpoint(disk).iteration == 50


@pytest.mark.parametrize(
    ("retention", "kept"),
    [(Retention(1), [30]), (Retention(2), [30, 20]), (Retention(None, 20), [30, 20])],
)
def test_what_goes_is_what_retention_lets_go(disk, retention, kept):
    save(disk, 30, retention)
    assert saved_iterations(disk) == kept


@pytest.mark.parametrize("retention", [Retention(), Retention(3), Retention(None, 10)])
def test_nothing_goes_that_retention_keeps(disk, retention):
    with pytest.raises(SaveError) as caught:
        save(disk, 30, retention)
    assert saved_iterations(disk) == [20, 10]
    assert sorted(os.listdir(disk)) == ["iter_0000010", "iter_0000020", LATEST]
    line = str(caught.value)
    assert "that of 20 is intact" in line and "bytes" in line and "free" in line
    assert ("set checkpoint.keep_last" in line) == (retention == Retention())


def test_a_damaged_one_goes_before_the_newest_valid_one(disk):
    flip_bit(disk / "iter_0000020" / "__0_0.distcp", random.Random(1))
    save(disk, 30, Retention(2))
    assert saved_iterations(disk) == [30, 10]


def test_nothing_goes_where_none_is_valid(disk):
    for iteration in (10, 20):
        flip_bit(disk / f"iter_00000{iteration}" / "__0_0.distcp", random.Random(1))
    with pytest.raises(SaveError):
        save(disk, 30, Retention(1))
    assert saved_iterations(disk) == [20, 10]


def test_room_for_one_and_a_half(tmp_path):
    with small_disk(tmp_path, "340k"):
        save(tmp_path, 10, Retention(1))
        for iteration in (20, 30):
            with pytest.raises(SaveError, match="newest valid one"):
                save(tmp_path, iteration, Retention(1))
            assert find_checkpoint(tmp_path).iteration == 10
        assert sorted(os.listdir(tmp_path)) == ["iter_0000010", LATEST]


CALLS = ("mkdir", "open", "fsync", "close", "rename", "replace", "unlink", "scandir", "listdir")
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@pytest.mark.parametrize("name", CALLS)
def test_any_call_may_fail(tmp_path, monkeypatch, name):
    """Each call of a save fails once: what is found is whole, nothing else lies there."""
    tensors, retention = shards_of(make_tensors()), Retention(2)
    for iteration in (1, 2):
        save_checkpoint(tmp_path, iteration, tensors, META, retention=retention)
    number = calls = 0
    while number <= calls:
        number += 1
        before = saved_iterations(tmp_path)[0]
        with failing_call(monkeypatch, name, number, CODES[number % len(CODES)]) as count:
            try:
                save_checkpoint(tmp_path, before + 1, tensors, META, retention=retention)
            except (SaveError, RetentionError) as error:
                assert str(error).isprintable()
            calls = count[0]
        found = find_checkpoint(tmp_path)
        assert found.iteration >= before and not found.passed_over
        save_checkpoint(tmp_path, before + 2, tensors, META, retention=retention)
        assert find_checkpoint(tmp_path).iteration == before + 2
        names = [entry for entry in os.listdir(tmp_path) if not entry.startswith("iter_")]
        assert names == [LATEST], names


def test_no_room_is_made_in_a_folder_that_was_taken_over(tmp_path):
    def taken():
        raise LockLost("taken over")

    save(tmp_path, 10)
    save(tmp_path, 20)
    with pytest.raises(LockLost):
        make_room(tmp_path, 30, Retention(1), None, taken)
    assert saved_iterations(tmp_path) == [20, 10]
