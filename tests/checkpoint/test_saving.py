"""Checkpoints in one process: bytes come back, a failed write harms nothing."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch

from fp8lm.checkpoint import (
    SaveError,
    Shard,
    check_save_folder,
    latest_iteration,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from fp8lm.checkpoint.files import anybody_may, publish, start_writing
from fp8lm.runtime.errors import InputError
from tests.checkpoint.tensors import (
    LATEST,
    META,
    assert_same_bytes,
    blank,
    file_size_limit,
    load,
    make_tensors,
    shards_of,
)


def test_every_byte_comes_back(saved):
    root, tensors = saved
    loaded = blank(tensors)
    meta = load(root, loaded)
    assert_same_bytes(loaded, tensors)
    assert meta["iteration"] == 100 and META.items() <= meta.items()
    assert meta["torch_version"] == torch.__version__


def test_layout(saved):
    root, _ = saved
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]
    assert sorted(os.listdir(root / "iter_0000100")) == [
        ".metadata",
        "__0_0.distcp",
        "checksums.sha256",
        "common.json",
    ]
    assert (root / LATEST).read_text().strip() == "100"
    assert latest_iteration(root) == 100


def test_views_and_parameters_are_filled_in_place(tmp_path):
    # A slice of a larger buffer is saved without the rest of the buffer, and filled alone.
    buffer = torch.arange(1000.0)
    save_checkpoint(tmp_path, 1, {"w": [Shard.whole(buffer[10:14].view(2, 2).t())]}, {})
    assert (tmp_path / "iter_0000001" / "__0_0.distcp").stat().st_size < 2000
    target = torch.nn.Parameter(torch.zeros(6))
    load_checkpoint(open_checkpoint(tmp_path), {"w": [Shard.whole(target[1:5].view(2, 2))]})
    assert target.tolist() == [0, 10, 12, 11, 13, 0]


def test_blocks_reshard(tmp_path):
    # Saved as rows {0-1, 2-6}, loaded as columns {0-3, 4}.
    whole = torch.arange(35, dtype=torch.int64).view(7, 5)
    save_checkpoint(tmp_path, 1, {"w": [Shard.whole(whole)]}, {})
    left, right = torch.zeros(7, 4, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int64)
    checkpoint = open_checkpoint(tmp_path)
    load_checkpoint(checkpoint, {"w": [Shard(left, (7, 5), (0, 0))]})
    load_checkpoint(checkpoint, {"w": [Shard(right, (7, 5), (0, 4))]})
    assert torch.cat((left, right), dim=1).equal(whole)


def test_blocks_that_make_no_whole_tensor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="w: the ranks' blocks hold 6 elements of 8"):
        save_checkpoint(tmp_path, 1, {"w": [Shard(torch.zeros(6), (8,), (2,))]}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("offset", [(0,), (5, 0), (-1, 0), (0, 0, 0)])
def test_block_outside_its_tensor(offset):
    with pytest.raises(ValueError, match="does not lie inside"):
        Shard(torch.zeros(3, 4), (6, 4), offset)


def test_iterations_are_chosen_and_replaced(saved):
    root, _ = saved
    newer, replaced = make_tensors(1), make_tensors(2)
    save_checkpoint(root, 200, shards_of(newer), META)
    save_checkpoint(root, 100, shards_of(replaced), META)
    assert latest_iteration(root) == 100
    for iteration, tensors in ((100, replaced), (200, newer)):
        loaded = blank(tensors)
        assert load(root, loaded, iteration=iteration)["iteration"] == iteration
        assert_same_bytes(loaded, tensors)
    assert sorted(os.listdir(root)) == ["iter_0000100", "iter_0000200", LATEST]


def test_killed_between_the_two_renames_of_a_replacement(saved):
    root, tensors = saved
    (root / "iter_0000100").rename(root / ".iter_0000100.old")
    (root / ".iter_0000100.tmp").mkdir()
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    save_checkpoint(root, 200, shards_of(tensors), META)
    assert sorted(os.listdir(root)) == ["iter_0000100", "iter_0000200", LATEST]


def test_a_writer_that_was_taken_for_dead_touches_no_checkpoint_of_another(saved):
    root, tensors = saved
    written = start_writing(root, 300)
    save_checkpoint(root, 300, shards_of(tensors), META)  # by the run in its place
    other = start_writing(root, 300)
    assert other != written
    with pytest.raises(FileNotFoundError):
        publish(written, 300, {"__0_0.distcp": ""}, {}, anybody_may)
    loaded = blank(tensors)
    load(root, loaded, iteration=300)
    assert_same_bytes(loaded, tensors)


# 10: the latest file or a header; 2,000: among the tensors, whose file is larger.
@pytest.mark.parametrize("num_bytes", [0, 10, 2000])
def test_failed_write_leaves_the_previous_checkpoint(saved, num_bytes):
    root, tensors = saved
    with file_size_limit(num_bytes), pytest.raises(SaveError, match="File too large") as caught:
        save_checkpoint(root, 200, shards_of(make_tensors(1)), META)
    assert "iteration 200" in str(caught.value) and "that of 100 is intact" in str(caught.value)
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)


@pytest.mark.parametrize("failing", ["rename", "replace"])
def test_failure_while_publishing(saved, monkeypatch, failing):
    root, tensors = saved

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(SaveError, match="No space left on device"):
            save_checkpoint(root, 100, shards_of(make_tensors(1)), META)
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot save checkpoints in"):
        check_save_folder(tmp_path / "file")
    with pytest.raises(SaveError, match="iteration 1 in"):
        save_checkpoint(tmp_path / "file", 1, {}, {})


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_filesystem_that_cannot_sync_folders(saved, monkeypatch, code):
    root, tensors = saved
    fsync = os.fsync

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    save_checkpoint(root, 101, shards_of(tensors), META)
    assert open_checkpoint(root).iteration == 101


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in make_tensors().items()}
    save_checkpoint(tmp_path, 1, shards_of(tensors), META)
    loaded = blank(tensors)
    load(tmp_path, loaded)
    assert_same_bytes(loaded, tensors)
