"""Ends a launcher that is cut off from the others soon after its workers.

torchrun waits for an answer of the store where the nodes meet, and where nothing comes back TCP
gives up after a quarter of an hour only (net.ipv4.tcp_retries2). Until then nothing is started, and
the workers have long ended, at parallel.distributed_timeout_minutes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import psutil

PATIENCE = 60.0  # seconds without workers and without the meeting
POLL = 5.0


def watch_meeting(
    endpoint: str,
    is_idle: Callable[[], bool],
    leave: Callable[[], None],
    patience: float = PATIENCE,
    poll: float = POLL,
) -> threading.Thread:
    """Call `leave` in a thread when for so long nobody answers at `endpoint`.

    Only while `is_idle`: there were workers, and none is left.
    """
    host, _, port = endpoint.rpartition(":")
    where = (host.strip("[]"), int(port))

    def watch() -> None:
        lost: float | None = None
        while lost is None or time.monotonic() - lost < patience:
            time.sleep(poll)
            if not is_idle() or _answers(where, poll):
                lost = None
            elif lost is None:
                lost = time.monotonic()
        leave()

    thread = threading.Thread(target=watch, name="lost link", daemon=True)
    thread.start()
    return thread


def is_running(process: psutil.Process) -> bool:
    """Whether it has not ended: a launcher that waits does not take note of its workers' ends."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _answers(where: tuple[str, int], timeout: float) -> bool:
    try:
        socket.create_connection(where, timeout).close()
    except OSError:
        return False
    return True
