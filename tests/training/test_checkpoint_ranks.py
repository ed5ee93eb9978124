"""Checkpoints of several ranks: any sharding loads under any other, errors reach every rank."""

from __future__ import annotations

import multiprocessing
import resource
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fp8lm.errors import InputError
from fp8lm.training.checkpoint import SaveError, Shard, load_checkpoint, save_checkpoint
from fp8lm.training.checkpoint_metadata import read_metadata

WORLD = 2
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
        "w": Shard(tensors["w"][row : row + count], (ROWS, COLUMNS), (row, 0)),
        "scale": Shard.whole(tensors["scale"]),
        "flat": Shard(tensors["flat"][7 * rank :], (7,), (7 * rank,)),
    }


def by_columns(tensors, rank):
    """Columns 0-3 and 4-5; `flat` cut in the middle; the scale on rank 1 alone."""
    column, count = ((0, 4), (4, 2))[rank]
    start, length = ((0, 3), (3, 4))[rank]
    shards = {
        "w": Shard(tensors["w"][:, column : column + count], (ROWS, COLUMNS), (0, column)),
        "flat": Shard(tensors["flat"][start : start + length], (7,), (start,)),
    }
    return {**shards, "scale": Shard.whole(tensors["scale"])} if rank == 1 else shards


def blank():
    return {name: torch.zeros_like(tensor) for name, tensor in full_tensors().items()}


def check_equal(shards, expected):
    for name, shard in shards.items():
        assert shard.tensor.equal(expected[name].tensor), name


def reshard(root, rank):
    full = full_tensors()
    for layout, other in ((by_rows, by_columns), (by_columns, by_rows)):
        save_checkpoint(root / layout.__name__, 1, layout(full, rank), {"by": layout.__name__})
        loaded = other(blank(), rank)
        meta = load_checkpoint(root / layout.__name__, loaded)
        assert meta["by"] == layout.__name__
        check_equal(loaded, other(full, rank))
    loaded = by_columns(blank(), rank)
    load_checkpoint(root / "one_process", loaded)
    check_equal(loaded, by_columns(full, rank))


def raise_everywhere(root, rank):
    # Only rank 1 asks for a tensor of another shape: rank 0 must hear of it, not wait for ever.
    shards = by_rows(blank(), rank)
    if rank == 1:
        shards["scale"] = Shard.whole(torch.zeros(3))
    with pytest.raises(InputError, match="from another model: scale"):
        load_checkpoint(root / "by_rows", shards)
    with pytest.raises(InputError, match="no checkpoint in"):
        load_checkpoint(root / "nothing", by_rows(blank(), rank))
    with pytest.raises(ValueError, match="w: the ranks' blocks hold 20 elements of 30"):
        column = Shard(torch.zeros(ROWS, 2), (ROWS, COLUMNS), (0, 2 * rank))
        save_checkpoint(root / "by_rows", 2, {"w": column}, {})


def fail_on_one_rank(root, rank):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    with pytest.raises(SaveError, match="File too large; that of 1 is intact"):
        save_checkpoint(root / "by_rows", 3, by_rows(full_tensors(), rank), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def run_rank(rank, root, failures):
    try:
        store = dist.FileStore(str(root / "store"), WORLD)
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
        reshard(root, rank)
        raise_everywhere(root, rank)
        fail_on_one_rank(root, rank)
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def test_two_ranks(tmp_path):
    full = full_tensors()
    whole = {name: Shard.whole(tensor) for name, tensor in full.items()}
    save_checkpoint(tmp_path / "one_process", 1, whole, {})

    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, tmp_path, failures)) for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in ranks] == [0] * WORLD

    for layout in ("by_rows", "by_columns"):
        loaded = {name: Shard.whole(tensor) for name, tensor in blank().items()}
        load_checkpoint(tmp_path / layout, loaded)
        check_equal(loaded, whole)
    folders = sorted(path.name for path in (tmp_path / "by_rows").iterdir())
    assert folders == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    # Two blocks of w, and once each the scale that both ranks hold and the flat of one rank.
    assert len(read_metadata(tmp_path / "by_rows" / "iter_0000001").storage_data) == 4
