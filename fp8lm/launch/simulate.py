"""Several machines, simulated on one: each is an agent of its own with its own workers.

They meet on the loopback interface, at a store that this process holds, so that any of them may
die. A machine that is killed takes its workers along and is replaced, as a cluster would do it. One
whose launcher ends by itself, because somebody has told it to stop for instance, is not: the others
get some seconds to do the same, as from `srun --wait`, and are told to stop then.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import FrameType

import psutil
import torch.distributed as dist

from fp8lm.launch.command import torchrun_arguments, torchrun_environment
from fp8lm.launch.exits import WARNINGS, describe_exit, job_exit_code, signal_exit_code
from fp8lm.launch.options import Options
from fp8lm.runtime.parent_death import tie_children

HOST = "127.0.0.1"
POLL = 0.1
PATIENCE = 10.0  # seconds
# Seconds in which a dead node is noticed: its heartbeat every second is missed five times.
RENDEZVOUS = {"is_host": 0, "keep_alive_interval": 1, "keep_alive_max_attempt": 5}


def run_simulated(options: Options, nproc_per_node: int, say: Callable[[str], None]) -> int:
    """Run the job on `options.nnodes` simulated machines; its exit code."""
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    rendezvous = replace(options, rdzv_endpoint=f"{HOST}:{store.port}", local_addr=HOST)
    nodes = []
    for number in range(options.nnodes):
        node = replace(rendezvous, node_rank=number)
        arguments = torchrun_arguments(node, nproc_per_node, RENDEZVOUS)
        nodes.append(Node(number, arguments, torchrun_environment(node)))
    return Cluster(nodes, options.max_restarts, say).run()


class Node:
    """A simulated machine: an agent, and what it has started."""

    def __init__(
        self, number: int, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.number, self.starts = number, 0
        self._command = [sys.executable, "-m", "fp8lm.launch.agent", *arguments]
        self._environment = {**os.environ, **environment}
        tie_children(self._environment)
        self._agent: subprocess.Popen | None = None
        self._family: list[psutil.Process] = []

    @property
    def agent(self) -> subprocess.Popen:
        """The process of the last start."""
        if self._agent is None:
            raise RuntimeError(f"node {self.number} has not been started")
        return self._agent

    def start(self) -> None:
        """Start it, for the first time or again."""
        self.starts += 1
        # In a session of its own, so that Ctrl-C reaches it through the cluster only.
        self._agent = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

    def poll(self) -> int | None:
        """The agent's exit code, None while it runs."""
        with suppress(psutil.Error):
            self._family = psutil.Process(self.agent.pid).children(recursive=True) or self._family
        return self.agent.poll()

    def kill_workers(self) -> None:
        """A machine that is gone has no processes left."""
        for process in self._family:
            with suppress(psutil.Error):
                process.kill()
        self._family = []


class Cluster:
    """Starts nodes, passes signals on to them, and replaces those that are killed.

    `replacements` is how often each may be; `patience` are the seconds that the others get when one
    has ended.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        replacements: int,
        say: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        self._nodes, self._replacements, self._say = list(nodes), replacements, say
        self._patience = patience
        self._running: list[Node] = []
        self._codes: list[int] = []
        self._signals: list[int] = []  # as they came; how many of them the nodes have got
        self._passed_on = 0
        self._deadline: float | None = None  # when one has ended: until when the others have to

    def run(self) -> int:
        """Wait for the end of all nodes; the job's exit code."""
        for number in (*WARNINGS, signal.SIGINT):
            signal.signal(number, self._receive)
        for node in self._nodes:
            if not self._signals:
                self._start(node)
                self._running.append(node)
        while self._running:
            time.sleep(POLL)
            self._pass_on()
            for node in list(self._running):
                self._look_at(node)
            self._end_the_rest()
        failed = [code for code in self._codes if code]
        if self._signals:
            return signal_exit_code(self._signals[0], self._codes, len(self._nodes))
        return job_exit_code(failed) if failed else 0

    def _start(self, node: Node) -> None:
        node.start()
        self._say(f" node {node.number}: process {node.agent.pid}")

    def _look_at(self, node: Node) -> None:
        code = node.poll()
        if code is None or (code < 0 and self._replace(node, code)):
            return
        self._running.remove(node)
        self._codes.append(code)
        if code and self._running and not self._signals and self._deadline is None:
            self._deadline = time.monotonic() + self._patience
            told = f" node {node.number} {describe_exit(code)}"
            self._say(f"{told}: the others have {self._patience:g} s to end as well")

    def _replace(self, node: Node, code: int) -> bool:
        node.kill_workers()
        if self._signals or self._deadline is not None or node.starts > self._replacements:
            self._say(f" node {node.number} {describe_exit(code)}")
            return False
        self._say(f" node {node.number} {describe_exit(code)}: another takes its place")
        self._start(node)
        return True

    def _end_the_rest(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = math.inf  # told once: a second signal would cut their saving short
            self._send(signal.SIGTERM)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Passed on by the loop: a node may be half started in this moment.
        self._signals.append(number)

    def _pass_on(self) -> None:
        while self._passed_on < len(self._signals):
            self._passed_on += 1
            self._send(self._signals[self._passed_on - 1])

    def _send(self, number: int) -> None:
        for node in self._running:
            node.agent.send_signal(number)
