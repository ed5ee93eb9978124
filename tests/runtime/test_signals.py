"""A second signal ends a process that does not answer, and a first or a repeated one does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from fp8lm.runtime.ending import SAME_REQUEST, second_signal
from tests.bad_input.cases import ROOT

# Answers no signal: it waits in C for a lock that it holds itself.
DEAF = """
import ctypes, signal, sys
from fp8lm.runtime.ending import exit_at_second_signal
exit_at_second_signal()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(lock)
print("ready", flush=True)
libc.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGINT, 130),
    ],
)
def test_a_second_signal_ends_a_process_that_waits_in_c(first, second, code):
    command = [sys.executable, "-c", DEAF]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        process.send_signal(first)  # the same request, passed on by a launcher
        time.sleep(SAME_REQUEST + 0.3)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(30) == code
        assert process.stderr.read() == f"a second signal ({second.name}): ended at once\n"


def test_only_urgent_signals_count():
    term, usr1, child = signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD
    received = [(usr1, 0.0), (usr1, 9.0), (term, 10.0), (child, 12.0), (usr1, 13.0)]
    with pytest.raises(EOFError):
        second_signal(received)
    assert second_signal([*received, (term, 10.5), (signal.SIGINT, 20.0)]) == signal.SIGINT
