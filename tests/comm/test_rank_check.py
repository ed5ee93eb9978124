"""What processes tell each other before they connect: addresses and GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm.env import DistEnv
from fp8lm.comm.groups import process_groups
from fp8lm.comm.rank_check import (
    Presence,
    addresses_line,
    exchange,
    find_presence,
    find_problem,
    found_by,
)
from fp8lm.runtime.errors import InputError, RunFailed
from tests.bad_input.cases import ROOT

HERE = Presence("node0", "net0", "10.0.0.1", "eth0")
THERE = Presence("node1", "net1", "10.0.0.2", "eth1")
LOST = Presence("node1", "net1", "127.0.1.1", "lo")


@pytest.mark.parametrize(
    "present",
    [
        [HERE, THERE],
        [LOST, LOST],  # one machine: its loopback will do
        [replace(HERE, gpu="a"), replace(HERE, gpu="b"), replace(THERE, gpu="c")],
    ],
)
def test_who_can_train_together(present):
    assert find_problem(present) is None


@pytest.mark.parametrize(
    ("present", "says"),
    [
        ([HERE, LOST], ("node1 (rank 1)", "127.0.1.1", "LOCAL_ADDR", "GLOO_SOCKET_IFNAME")),
        ([LOST, HERE], ("node1 (rank 0)", "127.0.1.1")),
        ([HERE, replace(THERE, address=None, interface="ib0")], ("no network interface ib0",)),
        ([HERE, replace(THERE, address=None, interface=None)], ("knows no address",)),
        # On one machine, too: gloo listens there.
        ([HERE, replace(HERE, address=None, interface="ib0")], ("ib0", "GLOO_SOCKET_IFNAME")),
        (
            [replace(HERE, gpu="a"), replace(HERE, gpu="b"), replace(HERE, gpu="b")],
            ("ranks 1 and 2 on node0", "CUDA_VISIBLE_DEVICES"),
        ),
    ],
)
def test_who_cannot(present, says):
    problem = find_problem(present)
    assert all(text in problem for text in says), problem


def test_machines_are_named():
    line = addresses_line([HERE, HERE, THERE])
    assert "node0 10.0.0.1 (eth0)" in line and "node1 10.0.0.2 (eth1)" in line
    assert addresses_line([HERE, HERE]) is None


def test_the_choice_of_the_user_stays():
    me = find_presence({"GLOO_SOCKET_IFNAME": "lo"}, None)
    assert (me.address, me.interface) == ("127.0.0.1", "lo")
    assert find_presence({"GLOO_SOCKET_IFNAME": "no0", "MASTER_ADDR": "::1"}, None).address is None
    assert found_by(THERE, [me, THERE]) == THERE


def test_one_process_with_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    with (
        pytest.raises(InputError, match=r"no network interface no0 .* GLOO_SOCKET_IFNAME"),
        process_groups(torch.device("cpu")),
    ):
        pass


def test_everyone_learns_of_everyone():
    store, learned = dist.HashStore(), {}

    def tell(rank):
        learned[rank] = exchange(store, DistEnv(rank, 3), "values", {"rank": rank})

    threads = [threading.Thread(target=tell, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert learned == {rank: [{"rank": r} for r in range(3)] for rank in range(3)}


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_missed(rank):
    """By rank 0, and by those that wait for its answer."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RunFailed, match=r"rank 1$" if rank == 0 else "rank 0"):
        exchange(store, DistEnv(rank, 2), "values", None)


JOIN = """
import torch, torch.distributed as dist
from fp8lm.comm.groups import process_groups
from fp8lm.runtime.errors import run_command
def main(argv):
    with process_groups(torch.device("cpu")) as groups:
        total = torch.ones(1)
        dist.all_reduce(total)
        print("together", int(total))
import sys; sys.exit(run_command(main))
"""
# Debian's /etc/hosts, which leads a machine's name to its own loopback.
MACHINE = """
hostname {name} && printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' >{hosts} &&
mount --bind {hosts} /etc/hosts && exec "$0" -c "$1"
"""


@pytest.fixture
def two_machines(tmp_path):
    """`start(number, **variables)`: a process in one of two network namespaces on one cable."""
    names = [f"fp8lm{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [("fp8lm0", "netns", name) for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.9.{number + 1}/24", "dev", "fp8lm0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "fp8lm0", "up")
    except (OSError, subprocess.CalledProcessError):
        remove(names)
        pytest.skip("needs root, iproute2 and network namespaces")

    def start(number, **variables):
        script = MACHINE.format(name=f"machine{number}", hosts=tmp_path / str(number))
        command = ["ip", "netns", "exec", names[number], "unshare", "--mount", "--uts", "sh", "-c"]
        rank = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
        return subprocess.Popen(
            [*command, script, sys.executable, JOIN],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | rank | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield start
    remove(names)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def remove(namespaces):
    with suppress(OSError):
        for name in namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_machines_whose_names_lead_to_loopback_meet(two_machines):
    """The first one knows itself by its name only."""
    processes = [
        two_machines(0, MASTER_ADDR="machine0"),
        two_machines(1, MASTER_ADDR="10.77.9.1"),
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "machine0 10.77.9.1 (fp8lm0), machine1 10.77.9.2 (fp8lm0)" in outputs[0][0]
    assert all("together 2" in out for out, _ in outputs)
