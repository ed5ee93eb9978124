"""Which checkpoints stay, and that the newest always does."""

from __future__ import annotations

import os

import pytest

from fp8lm.checkpoint import Retention, find_checkpoint, save_checkpoint
from fp8lm.checkpoint.files import check_save_folder, forget_after, saved_iterations
from tests.checkpoint.tensors import META, make_tensors, shards_of

SAVED = (10, 20, 30, 40, 50)


@pytest.mark.parametrize(
    ("keep_last", "interval", "kept"),
    [
        (None, None, [50, 40, 30, 20, 10]),
        (1, None, [50]),
        (3, None, [50, 40, 30]),
        (9, None, [50, 40, 30, 20, 10]),
        (None, 20, [50, 40, 20]),
        (2, 30, [50, 40, 30]),
        (1, 7, [50]),
    ],
)
def test_what_stays(tmp_path, keep_last, interval, kept):
    shards, retention = shards_of(make_tensors()), Retention(keep_last, interval)
    for iteration in SAVED:
        save_checkpoint(tmp_path, iteration, shards, META, retention=retention)
        assert find_checkpoint(tmp_path).iteration == iteration
    assert saved_iterations(tmp_path) == kept
    assert len(os.listdir(tmp_path)) == len(kept) + 1


def test_checkpoints_of_another_past_are_left_alone():
    # Someone went back to 20 by hand: 40 and 50 are newer than what is written then.
    retention = Retention(keep_last=1)
    assert retention.superseded([50, 40, 30, 20, 10], latest=30) == [20, 10]


def test_forgetting_what_came_later(tmp_path):
    for iteration in SAVED:
        save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
    forget_after(tmp_path, 30)
    assert saved_iterations(tmp_path) == [30, 20, 10]
    assert find_checkpoint(tmp_path).iteration == 30


def test_one_that_was_deleted_in_part_is_no_checkpoint(tmp_path):
    for iteration in (10, 20):
        save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
    (tmp_path / "iter_0000010").rename(tmp_path / ".iter_0000010.removed")
    (tmp_path / ".iter_0000010.removed" / ".metadata").unlink()
    assert saved_iterations(tmp_path) == [20]
    check_save_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000020", "latest_checkpointed_iteration.txt"]
