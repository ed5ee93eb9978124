"""A worker that torchrun starts, without PyTorch: ends as it is told, or when it hears a signal.

worker.py RANK:CODE ...    the rank ends with CODE; -n: kills itself with signal n; without one it
                           ends with 0
worker.py saves SECONDS [CODE]    on SIGUSR1 or SIGTERM it saves for so long and ends with 75, or
                           rank 1 with CODE; with 0 it fails without a word
worker.py waits [SECONDS CODE]    tied to its launcher as a training is, it waits for a minute or
                           for so long, and ends with 0 or CODE
worker.py again            the first time it ends with 75; then it waits, and dies of a signal
"""

from __future__ import annotations

import os
import signal
import sys
import time

from fp8lm.runtime.errors import leave_exit_code
from fp8lm.runtime.parent_death import tie_to_parent

rank = os.environ["RANK"]
leave_exit_code(None)
if sys.argv[1] == "waits":
    tie_to_parent()
    print(f"rank {rank} ready", flush=True)
    seconds, code = sys.argv[2:] or (60, 0)
    time.sleep(float(seconds))
    sys.exit(int(code))
if sys.argv[1] == "again":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        leave_exit_code(75)
        sys.exit(75)
    print(f"rank {rank} ready", flush=True)
    time.sleep(60)
if sys.argv[1] == "saves":

    def save(number, _frame):
        time.sleep(float(sys.argv[2]))
        print(f"rank {rank} saved on {signal.Signals(number).name}", flush=True)
        code = int(sys.argv[3]) if rank == "1" and len(sys.argv) > 3 else 75
        if code:
            leave_exit_code(code)
        sys.exit(code or 1)

    signal.signal(signal.SIGUSR1, save)
    signal.signal(signal.SIGTERM, save)
    print(f"rank {rank} ready", flush=True)
    time.sleep(60)
code = int(dict(word.split(":") for word in sys.argv[1:]).get(rank, 0))
if code < 0:
    os.kill(os.getpid(), -code)
if code:
    print(f"rank {rank} has failed", file=sys.stderr, flush=True)
else:
    time.sleep(0.5 * (len(sys.argv) > 2))
sys.exit(code)
