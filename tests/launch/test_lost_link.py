"""A launcher that nobody answers any more, and that has no workers left."""

from __future__ import annotations

import socket
import subprocess
import threading
import time

import psutil

from fp8lm.launch.lost_link import is_running, watch_meeting

SOON, NEVER = 20.0, 0.5  # seconds


def watch(endpoint, is_idle=lambda: True):
    left = threading.Event()
    watch_meeting(endpoint, is_idle, left.set, patience=0.1, poll=0.02)
    return left


def test_it_leaves_when_the_meeting_is_lost():
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        left = watch(endpoint)
        assert not left.wait(NEVER)
    assert left.wait(SOON)


def test_it_stays_with_its_workers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    workers = threading.Event()
    left = watch(endpoint, is_idle=workers.is_set)
    assert not left.wait(NEVER)
    workers.set()
    assert left.wait(SOON)


def test_a_worker_that_has_ended_is_none_before_anybody_waits_for_it():
    worker = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(worker.pid)
    assert is_running(process)
    worker.kill()
    deadline = time.monotonic() + SOON
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(process)
    worker.wait()
    assert not is_running(process)
