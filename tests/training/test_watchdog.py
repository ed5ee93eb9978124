"""A slow step: the rank that it waits for is named, and where in the program that rank is."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter, all_gather_scalars
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.data.batches import MicroBatchSampler
from fp8lm.training.spikes import LossSpike
from fp8lm.training.watchdog import Heartbeats, Watchdog

pytestmark = pytest.mark.slow

INTERVAL = 0.1


def steps(path, slow_rank, how, after_usual=6):
    """What this rank's watchdog wrote to stderr in steps of a collective, the last one slow."""
    store = dist.FileStore(str(path), dist.get_world_size())
    wire, text = Wire("grads", "fp32", WireCounter()), io.StringIO()
    with model_parallel_groups() as groups, contextlib.redirect_stderr(text):
        groups = replace(groups, store=store)
        with Watchdog(groups, 5.0, interval=INTERVAL, shortest=0.3) as watchdog:
            for iteration in range(1, after_usual + 1):
                with watchdog.step(iteration):
                    time.sleep(0.02)
                    if iteration == after_usual and dist.get_rank() == slow_rank:
                        how()
                    all_gather_scalars(torch.zeros(1), groups.world, wire)
    return text.getvalue()


def work():
    time.sleep(2.0)


def stand_still():
    """Stop this process, as a debugger or a dying machine would, and let another continue it."""
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep 2.5; kill -CONT {pid}"])
    os.kill(pid, signal.SIGSTOP)


def test_a_slow_rank_is_named(run_distributed, tmp_path):
    first, *others = run_distributed(steps, 4, tmp_path / "store", 2, work)
    assert "warning: iteration 6 has taken " in first
    assert "s (usually 0.0 s): rank 2 (" in first
    assert f", process {os.getpid()}" not in first and ") is not done: unknown" in first
    assert others == ["", "", ""]


@pytest.mark.parametrize("silent", [0, 3])
def test_a_silent_rank_is_named_by_the_lowest_that_is_not(run_distributed, tmp_path, silent):
    texts = run_distributed(steps, 4, tmp_path / "store", silent, stand_still)
    reporter = 1 if silent == 0 else 0
    assert f"rank {silent} (" in texts[reporter]
    assert "is silent (stopped, swapping or dead)" in texts[reporter]
    assert not any(texts[rank] for rank in range(4) if rank not in (reporter, silent))


def test_usual_steps_are_not_worth_a_word(run_distributed, tmp_path):
    assert run_distributed(steps, 2, tmp_path / "store", 1, nothing) == ["", ""]


def nothing():
    """A step like the others."""


def a_step_that_a_spike_ends(path):
    """What the watchdog writes while the run goes back, which takes long."""
    store = dist.FileStore(str(path), dist.get_world_size())
    text = io.StringIO()
    with model_parallel_groups() as groups, contextlib.redirect_stderr(text):
        groups = replace(groups, store=store)
        with Watchdog(groups, 5.0, interval=INTERVAL, shortest=0.3) as watchdog:
            for iteration in range(1, 5):
                with watchdog.step(iteration):
                    time.sleep(0.02)
            with contextlib.suppress(LossSpike), watchdog.step(5):
                raise LossSpike(3, 2.0, 9.0)
            time.sleep(2.0)
    return text.getvalue()


def test_what_comes_after_a_spike_is_no_slow_step(run_distributed, tmp_path):
    assert run_distributed(a_step_that_a_spike_ends, 2, tmp_path / "store") == ["", ""]


def test_a_rank_is_found_in_its_function():
    store = dist.HashStore()
    for rank, place in enumerate(
        ["fp8lm.comm.transport.finish, line 9", "fp8lm.data.batches._next"]
    ):
        store.set(str(rank), f"7 120 node{rank} {40 + rank} {place}")
    beats = Heartbeats(2)
    beats.read(store)
    assert beats.silent == []
    assert beats.verdict() == "rank 1 (node1, process 41) is not done: fp8lm.data.batches._next"
    store.set("1", "7 120 node1 41 fp8lm.comm.p2p.receive, line 3")
    beats.read(store)
    assert "all ranks" in beats.verdict() and "rank 0 is in fp8lm.comm." in beats.verdict()


class Alone:
    """Groups of one process, as far as a watchdog knows them."""

    store = None

    class world:
        rank = staticmethod(lambda: 0)
        size = staticmethod(lambda: 1)


@pytest.mark.parametrize("what", ["iteration 1", "evaluation"])
def test_one_process_is_told_where_it_is(what, capsys):
    times = {"interval": 0.05, "shortest": 0.2, "unusual": 0.2}
    with Watchdog(Alone(), 5.0, **times) as watchdog:
        with watchdog.phase(what) if what == "evaluation" else watchdog.step(1):
            MicroBatchSampler(Slow(), 1, 0, 1, 0)
        time.sleep(0.5)  # between two steps nothing is watched
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f" warning: {what} has taken ")
    assert "it is in fp8lm.data.batches.__init__, line " in line


class Slow:
    """A number of samples that takes its time."""

    def __sub__(self, other):
        time.sleep(0.35)
        return 1


def test_the_usual_time_of_each_kind_is_its_own(capsys):
    with Watchdog(Alone(), 5.0, interval=0.05, shortest=0.3) as watchdog:
        for iteration in range(1, 6):
            with watchdog.step(iteration):
                time.sleep(0.01)
        with watchdog.phase("evaluation"):  # no step, and its usual time is not known
            time.sleep(0.6)
        assert capsys.readouterr().err == ""
        with watchdog.step(6):
            time.sleep(0.6)
    assert "iteration 6 has taken" in capsys.readouterr().err
