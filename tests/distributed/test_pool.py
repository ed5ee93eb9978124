"""The pool itself: results, failures with their cause, hangs with their names, recovery."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fp8lm
from tests.distributed.pool import ROOT


def rank_sum(x):
    total = x * dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def process():
    return os.getpid(), torch.get_num_threads(), Path(fp8lm.__file__)


def fail_on(bad_rank, error):
    if dist.get_rank() == bad_rank:
        raise error
    dist.barrier()


def hang_on(silent):
    if dist.get_rank() in silent:
        time.sleep(600)


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__("lost")


def fail_unpicklably():
    raise Unpicklable(1, 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_in_rank_order(run_distributed, world_size):
    x = torch.ones(3, dtype=torch.bfloat16)
    results = run_distributed(rank_sum, world_size, x)
    assert [rank for rank, _ in results] == list(range(world_size))
    for _, total in results:
        assert torch.equal(total, x * sum(range(world_size)))


def test_workers_are_reused_processes_of_this_checkout(run_distributed):
    first, second = (run_distributed(process, 2) for _ in range(2))
    assert first == second
    assert len({os.getpid(), *(pid for pid, _, _ in first)}) == 3
    assert {threads for _, threads, _ in first} == {1}
    assert all(path.is_relative_to(ROOT) for _, _, path in first)


def test_failure_is_raised_here_and_a_new_pool_follows(run_distributed):
    before = run_distributed(process, 2)
    with pytest.raises(ValueError, match="on purpose") as caught:
        run_distributed(fail_on, 2, 1, ValueError("on purpose"))
    assert "on rank 1 of 2:" in caught.value.__notes__[0]
    assert "in fail_on" in caught.value.__notes__[0]
    after = run_distributed(process, 2)
    assert {pid for pid, _, _ in before}.isdisjoint(pid for pid, _, _ in after)


def test_exception_that_cannot_be_pickled(run_distributed):
    with pytest.raises(RuntimeError, match="Unpicklable: lost"):
        run_distributed(fail_unpicklably, 2)


def test_silent_ranks_are_named(run_distributed):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hang_on: no answer from rank 0, 1 of 2 within 0\.5 s"):
        run_distributed(hang_on, 2, [1], timeout=0.5)  # rank 0 waits for rank 1 at the end
    assert time.monotonic() - start < 10


def test_death_of_a_worker_is_told(run_distributed):
    with pytest.raises(RuntimeError, match="rank 1 of 2 died: exit code 3"):
        run_distributed(die_on, 2, 1)
