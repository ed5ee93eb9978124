"""Several machines, simulated on one: each is an agent of its own with its own workers.

They meet on the loopback interface, at a store that this process holds, so that any of them may
die. A machine that is killed takes its workers along and is replaced, as a cluster would do it.
"""

from __future__ import annotations

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

HOST = "127.0.0.1"
POLL = 0.1
# Seconds in which a dead node is noticed: its heartbeat every second is missed five times.
RENDEZVOUS = {"is_host": 0, "keep_alive_interval": 1, "keep_alive_max_attempt": 5}


def simulate(options: Options, nproc_per_node: int, say: Callable[[str], None]) -> int:
    """Run the job on `options.nnodes` simulated machines; its exit code."""
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    meeting = replace(options, rdzv_endpoint=f"{HOST}:{store.port}", local_addr=HOST)
    nodes = []
    for number in range(options.nnodes):
        node = replace(meeting, node_rank=number)
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
        self._family: list[psutil.Process] = []

    def start(self) -> None:
        """Start it, for the first time or again."""
        self.starts += 1
        # In a session of its own, so that Ctrl-C reaches it through the cluster only.
        self.agent = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

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

    `replacements` is how often each may be.
    """

    def __init__(
        self, nodes: Sequence[Node], replacements: int, say: Callable[[str], None]
    ) -> None:
        self._nodes, self._replacements, self._say = list(nodes), replacements, say
        self._received: int | None = None

    def run(self) -> int:
        """Wait for the end of all nodes; the job's exit code."""
        for number in (*WARNINGS, signal.SIGINT):
            signal.signal(number, self._pass_on)
        for node in self._nodes:
            self._start(node)
        running, codes, finished = list(self._nodes), [], 0
        while running:
            time.sleep(POLL)
            for node in list(running):
                code = node.poll()
                if code is None or (code < 0 and self._replace(node, code)):
                    continue
                running.remove(node)
                if code:
                    codes.append(code)
                else:
                    finished += 1
        if self._received is not None:
            return signal_exit_code(self._received, [0] * finished + codes, len(self._nodes))
        return job_exit_code(codes) if codes else 0

    def _start(self, node: Node) -> None:
        node.start()
        self._say(f" node {node.number}: process {node.agent.pid}")

    def _replace(self, node: Node, code: int) -> bool:
        node.kill_workers()
        if self._received is not None or node.starts > self._replacements:
            self._say(f" node {node.number} {describe_exit(code)}")
            return False
        self._say(f" node {node.number} {describe_exit(code)}: another takes its place")
        self._start(node)
        return True

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        for node in self._nodes:
            with suppress(ProcessLookupError):
                node.agent.send_signal(number)
