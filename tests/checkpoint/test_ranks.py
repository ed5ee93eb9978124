"""Checkpoints of several ranks: any sharding loads under any other, errors reach every rank."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8lm.checkpoint import (
    CheckpointSaver,
    SaveError,
    Shard,
    check_save_folder,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from fp8lm.checkpoint import background as background_module
from fp8lm.checkpoint.integrity import read_metadata
from fp8lm.runtime.errors import InputError
from tests.checkpoint.tensors import file_size_limit

pytestmark = pytest.mark.slow

ROWS, COLUMNS = 5, 6


def full_tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "w": torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator),
        "scale": torch.tensor(0.25),
        "flat": torch.randn(7, generator=generator).half(),
    }


def by_rows(tensors, rank):
    """Rows 0-1 and 2-4; `flat` all on rank 0; the scale on both."""
    row, count = ((0, 2), (2, 3))[rank]
    return {
        "w": [Shard(tensors["w"][row : row + count], (ROWS, COLUMNS), (row, 0))],
        "scale": [Shard.whole(tensors["scale"])],
        "flat": [Shard(tensors["flat"][7 * rank :], (7,), (7 * rank,))],
    }


def by_columns(tensors, rank):
    """Columns 0-3 and 4-5; `flat` cut in the middle; the scale on rank 1 alone."""
    column, count = ((0, 4), (4, 2))[rank]
    start, length = ((0, 3), (3, 4))[rank]
    shards = {
        "w": [Shard(tensors["w"][:, column : column + count], (ROWS, COLUMNS), (0, column))],
        "flat": [Shard(tensors["flat"][start : start + length], (7,), (start,))],
    }
    return {**shards, "scale": [Shard.whole(tensors["scale"])]} if rank == 1 else shards


def blank():
    return {name: torch.zeros_like(tensor) for name, tensor in full_tensors().items()}


def whole(tensors):
    return {name: [Shard.whole(tensor)] for name, tensor in tensors.items()}


def check_equal(shards, expected):
    for name, (shard,) in shards.items():
        assert shard.tensor.equal(expected[name][0].tensor), name


def reshard(root):
    rank, full = dist.get_rank(), full_tensors()
    for layout, other in ((by_rows, by_columns), (by_columns, by_rows)):
        save_checkpoint(root / layout.__name__, 1, layout(full, rank), {"by": layout.__name__})
        loaded = other(blank(), rank)
        checkpoint = open_checkpoint(root / layout.__name__)
        load_checkpoint(checkpoint, loaded)
        assert checkpoint.common["by"] == layout.__name__
        check_equal(loaded, other(full, rank))
    loaded = by_columns(blank(), rank)
    load_checkpoint(open_checkpoint(root / "one_process"), loaded)
    check_equal(loaded, by_columns(full, rank))


def test_any_sharding_loads_under_any_other(run_distributed, tmp_path):
    save_checkpoint(tmp_path / "one_process", 1, whole(full_tensors()), {})
    run_distributed(reshard, 2, tmp_path)
    for layout in ("by_rows", "by_columns"):
        loaded = whole(blank())
        load_checkpoint(open_checkpoint(tmp_path / layout), loaded)
        check_equal(loaded, whole(full_tensors()))
    # Two blocks of w, and once each the scale that both ranks hold and the flat of one rank.
    assert len(read_metadata(tmp_path / "by_rows" / "iter_0000001").storage_data) == 4


def raise_everywhere(root):
    # Only rank 1 asks for a tensor of another shape: rank 0 must hear of it, not wait for ever.
    rank = dist.get_rank()
    save_checkpoint(root, 1, by_rows(full_tensors(), rank), {})
    shards = by_rows(blank(), rank)
    if rank == 1:
        shards["scale"] = [Shard.whole(torch.zeros(3))]
    with pytest.raises(InputError, match="from another model: scale"):
        load_checkpoint(open_checkpoint(root), shards)
    with pytest.raises(InputError, match="no checkpoint in"):
        open_checkpoint(root / "nothing")
    with pytest.raises(ValueError, match="w: the ranks' blocks hold 20 elements of 30"):
        column = Shard(torch.zeros(ROWS, 2), (ROWS, COLUMNS), (0, 2 * rank))
        save_checkpoint(root, 2, {"w": [column]}, {})
    limit = file_size_limit(100 if rank == 1 else -1)
    with limit, pytest.raises(SaveError, match="that of 1 is intact"):
        save_checkpoint(root, 3, by_rows(full_tensors(), rank), {})


def test_an_error_of_one_rank_is_raised_on_all(run_distributed, tmp_path):
    run_distributed(raise_everywhere, 2, tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def pass_over(root):
    """What was found while the file that rank 1 checks was damaged."""
    rank = dist.get_rank()
    for iteration in (1, 2):
        save_checkpoint(root, iteration, by_rows(full_tensors(), rank), {})
    if rank == 0:
        path = root / "iter_0000002" / "__1_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
    found = find_checkpoint(root)
    return found.iteration, found.passed_over


def test_all_ranks_pass_over_what_one_finds_damaged(run_distributed, tmp_path):
    results = run_distributed(pass_over, 2, tmp_path)
    assert results[0] == results[1]
    iteration, (problem,) = results[0]
    assert iteration == 1
    assert problem.startswith("iteration 2: ") and "__1_0.distcp is damaged" in problem


def save_to_a_disk_of_its_own(root):
    """Rank 1 sees another folder under the same relative path."""
    rank = dist.get_rank()
    folder = root / f"machine_{rank}"
    folder.mkdir()
    former = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(InputError, match=r"in ck: rank 1 \(of 1 ranks\) does not see"):
            check_save_folder("ck")
        with pytest.raises(SaveError, match="which rank 0 has made, is not there"):
            save_checkpoint("ck", 1, by_rows(full_tensors(), rank), {})
    finally:
        os.chdir(former)


def test_a_folder_that_not_all_ranks_see(run_distributed, tmp_path):
    run_distributed(save_to_a_disk_of_its_own, 2, tmp_path)
    assert os.listdir(tmp_path / "machine_0" / "ck") == []


def one_folder(root):
    check_save_folder(root)
    return sorted(os.listdir(root))


def test_a_folder_that_all_ranks_see(run_distributed, tmp_path):
    assert run_distributed(one_folder, 2, tmp_path / "ck") == [[], []]


def make_saver(root, asynchronous, seconds_of_rank_1):
    """A saver whose training group has a timeout of one second, and a rank that writes slowly."""
    save_checkpoint = background_module.save_checkpoint

    def save_slowly(*args):
        if dist.get_rank() == 1:
            time.sleep(seconds_of_rank_1)
        return save_checkpoint(*args)

    saver = CheckpointSaver(
        root,
        dist.new_group(timeout=timedelta(seconds=30)),
        asynchronous=asynchronous,
        training_group=dist.new_group(timeout=timedelta(seconds=1)),
    )
    return saver, mock.patch.object(background_module, "save_checkpoint", save_slowly)


def save_slowly(root, asynchronous):
    rank = dist.get_rank()
    with ExitStack() as stack:
        saver, slow = make_saver(root, asynchronous, 2.5)
        stack.enter_context(mock.patch.object(background_module, "LONGEST_PAUSE", 0.2))
        stack.enter_context(slow)
        for iteration in (1, 2):
            saver.save(iteration, by_rows(full_tensors(), rank), {})
        saver.close()
    return [(outcome.iteration, outcome.error) for outcome in saver.collect()]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_slow_file_is_waited_for(run_distributed, tmp_path, asynchronous):
    results = run_distributed(save_slowly, 2, tmp_path, asynchronous)
    assert results == [[(1, None), (2, None)]] * 2


def wait_for_a_rank_that_is_gone(root, asynchronous):
    """Seconds until the ranks that save know that the last one does not."""
    rank = dist.get_rank()
    saver, _ = make_saver(root, asynchronous, 0)
    if rank == 1:
        return 0.0
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
        saver.save(1, by_rows(full_tensors(), rank), {})
        saver.wait()
    return time.monotonic() - started


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_is_gone_is_not_waited_for(run_distributed, tmp_path, asynchronous):
    seconds, _ = run_distributed(wait_for_a_rank_that_is_gone, 2, tmp_path, asynchronous)
    assert seconds < 15  # of the 30 that a slow file may take
