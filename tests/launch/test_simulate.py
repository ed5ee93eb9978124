"""Several machines on this one: they train together, and one may be killed, or told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from fp8lm.checkpoint import latest_iteration
from fp8lm.config import load_config
from fp8lm.launch.simulate import Cluster
from tests.launch.conftest import ROOT, reports
from tests.training.runs import train

CONFIG = "configs/gpt_tiny.yaml"
# Every machine is two processes, which import PyTorch. The batch is for two of them or three.
BATCH = ["train.micro_batch_size=2", "train.global_batch_size=12"]
SMALL = [*BATCH, "model.num_layers=2", "train.eval_iters=0", "train.train_iters=40"]


def overrides(folder):
    kept = [f"checkpoint.{key}={folder}/checkpoints" for key in ("save", "load")]
    return [*SMALL, *kept, "checkpoint.save_interval=5", f"logging.dir={folder}"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("nodes", "victim"), [(2, 1), (3, 0)])
def test_a_killed_node_is_replaced_and_nothing_is_lost(
    launch, run_distributed, tmp_path, nodes, victim
):
    """Every report equals that of as many processes that nothing happened to."""
    command = ["scripts/train_multinode.sh", "--simulate", nodes, CONFIG]
    job = launch([*command, *overrides(tmp_path / "killed")])
    agent = int(job.wait_for(rf"node {victim}: process (\d+)")[1])
    job.wait_for(r"iteration +7/")
    os.kill(agent, signal.SIGKILL)
    run_distributed(train, nodes, load_config(ROOT / CONFIG, overrides(tmp_path / "calm")))
    assert job.finish() == 0, job.output
    assert f" node {victim} was killed by SIGKILL: another takes its place" in job.output
    assert "loaded checkpoint" in job.output
    expected = reports(tmp_path / "calm")
    assert reports(tmp_path / "killed") == expected
    assert [line["iteration"] for line in expected] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_told_to_stop_ends_the_job(launch, tmp_path):
    """All have saved with it; the other would wait for it in vain."""
    many = ["train.train_iters=9999", "scheduler.lr_decay_iters=9999"]
    command = ["scripts/train_multinode.sh", "--simulate", "2", CONFIG, *overrides(tmp_path), *many]
    job = launch(command)
    agent = int(job.wait_for(r"node 1: process (\d+)")[1])
    job.wait_for(r"iteration +7/")
    os.kill(agent, signal.SIGTERM)
    assert job.finish() == 75, job.output
    assert " node 1 ended with exit code 75: " in job.output
    assert f"stopped after iteration {latest_iteration(tmp_path / 'checkpoints')}" in job.output


NODE = """
from fp8lm.launch.simulate import Node
meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
node = Node(0, ["--nproc-per-node=1", *meeting, "tests/launch/worker.py", "waits"], {})
node.start()
node.agent.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux ties processes together")
def test_nodes_do_not_outlive_a_killed_launcher(launch):
    job = launch([sys.executable, "-c", NODE])
    job.wait_for("rank 0 ready")
    family = psutil.Process(job.process.pid).children(recursive=True)
    job.process.kill()
    assert len(family) == 2 and not psutil.wait_procs(family, timeout=5)[1]


class FakeNode:
    """A machine whose launcher is this shell command; `at_start` happens while it is started."""

    def __init__(self, number, command, at_start=lambda: None):
        self.number, self.starts, self.agent = number, 0, None
        self._command, self._at_start = command, at_start

    def start(self):
        self.starts += 1
        self._at_start()
        self.agent = subprocess.Popen(["bash", "-c", self._command])

    def poll(self):
        return self.agent.poll()

    def kill_workers(self):
        pass


WAITS = "exec sleep 30"


@pytest.fixture
def cluster():
    """`cluster(*nodes)`: the exit code of a cluster with a replacement for each, and what it said.

    The handlers of signals are put back.
    """
    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    former = {number: signal.getsignal(number) for number in handled}
    said = []
    yield lambda *nodes: (Cluster(nodes, 1, said.append, patience=0.5).run(), "\n".join(said))
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_nodes_are_started(cluster, number):
    """It reaches the one that has been half started, and no further one is."""
    first = FakeNode(0, WAITS, lambda: os.kill(os.getpid(), number))
    second = FakeNode(1, WAITS)
    code, said = cluster(first, second)
    assert code == 128 + number and second.starts == 0
    assert "node 0" in said and "takes its place" not in said


def test_a_killed_node_is_replaced_as_often_as_told(cluster):
    dies = FakeNode(0, "kill -9 $$")
    code, said = cluster(dies, FakeNode(1, WAITS))
    assert (code, dies.starts) == (137, 2)
    assert said.count("another takes its place") == 1


def test_the_others_are_not_waited_for_when_one_has_ended(cluster):
    code, said = cluster(FakeNode(0, "exit 75"), FakeNode(1, WAITS))
    assert code == 75
    assert " node 0 ended with exit code 75: the others have 0.5 s" in said


def test_the_end_of_all(cluster):
    assert cluster(FakeNode(0, "exit 0"), FakeNode(1, "exit 0"))[0] == 0
