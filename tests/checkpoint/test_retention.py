"""Which checkpoints stay, and that the newest always does."""

from __future__ import annotations

import os
import shutil

import pytest

from fp8lm.checkpoint import (
    Retention,
    RetentionError,
    check_save_folder,
    claim_save_dir,
    find_checkpoint,
    save_checkpoint,
)
from fp8lm.checkpoint.files import delete_after, saved_iterations
from fp8lm.runtime.errors import InputError
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


def test_one_that_cannot_be_deleted_harms_no_other(tmp_path, monkeypatch):
    shards, retention = shards_of(make_tensors()), Retention(keep_last=1)
    save_checkpoint(tmp_path, 10, shards, META)
    delete = shutil.rmtree

    def refuse(path, **options):
        if "0000010" in str(path):
            raise PermissionError(f"no permission to delete {path}")
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(RetentionError, match="older ones"):
        save_checkpoint(tmp_path, 20, shards, META, retention=retention)
    check_save_folder(tmp_path)  # the next start
    save_checkpoint(tmp_path, 30, shards, META, retention=retention)
    assert saved_iterations(tmp_path) == [30]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    shards, retention = shards_of(make_tensors()), Retention(keep_last=1)
    elsewhere = tmp_path / "elsewhere"
    save_checkpoint(elsewhere, 10, shards, META)
    root = tmp_path / "ck"
    root.mkdir()
    (root / "iter_0000010").symlink_to(elsewhere / "iter_0000010")
    save_checkpoint(root, 20, shards, META, retention=retention)
    assert sorted(os.listdir(root)) == ["iter_0000020", "latest_checkpointed_iteration.txt"]
    assert find_checkpoint(elsewhere).iteration == 10


def test_checkpoints_of_another_past_are_set_aside(tmp_path):
    # Someone went back to 20 by hand, twice.
    for _ in range(2):
        for iteration in SAVED:
            save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
        assert claim_save_dir(tmp_path, 20, own=True) == [50, 40, 30]
    assert saved_iterations(tmp_path) == [20, 10]
    names = [f"iter_00000{number}" for number in (30, 40, 50)]
    assert sorted(os.listdir(tmp_path / "set_aside")) == sorted(
        [*names, *(f"{name}.2" for name in names)]
    )
    assert find_checkpoint(tmp_path / "set_aside").iteration == 50


def test_newer_ones_that_cannot_be_moved(tmp_path):
    for iteration in (10, 20):
        save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
    (tmp_path / "set_aside").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"newer checkpoints in .*: "):
        claim_save_dir(tmp_path, 10, own=True)
    assert saved_iterations(tmp_path) == [20, 10]


def test_a_folder_of_another_run_is_not_taken_over(tmp_path):
    assert claim_save_dir(tmp_path, 0, own=False) == []
    save_checkpoint(tmp_path, 10, shards_of(make_tensors()), META)
    with pytest.raises(InputError, match=r"up to iteration 10, .*: set checkpoint.load=.* as well"):
        claim_save_dir(tmp_path, 0, own=False)


def test_forgetting_what_came_later(tmp_path):
    for iteration in SAVED:
        save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
    delete_after(tmp_path, 30)
    assert saved_iterations(tmp_path) == [30, 20, 10]
    assert find_checkpoint(tmp_path).iteration == 30
    delete_after(tmp_path, 0)
    assert find_checkpoint(tmp_path) is None and os.listdir(tmp_path) == []


def test_one_that_was_deleted_in_part_is_no_checkpoint(tmp_path):
    for iteration in (10, 20):
        save_checkpoint(tmp_path, iteration, shards_of(make_tensors()), META)
    (tmp_path / "iter_0000010").rename(tmp_path / ".iter_0000010.removed")
    (tmp_path / ".iter_0000010.removed" / ".metadata").unlink()
    assert saved_iterations(tmp_path) == [20]
    check_save_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000020", "latest_checkpointed_iteration.txt"]
