"""Early stops of a run: a signal, the end of its time, or a lost folder lock.

A signal reaches one process, at any moment; all ranks must stop after the same step. So each rank
says in the step's one exchange of scalars what it knows, and all act on the largest.
"""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from types import FrameType
from typing import Any

import psutil

from fp8lm.checkpoint import latest_iteration
from fp8lm.comm.env import DistEnv
from fp8lm.config import CheckpointConfig, TrainConfig
from fp8lm.runtime.errors import EXIT_RESTART, InputError
from fp8lm.runtime.run_lock import RunLocks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TIME_IS_OVER = 1000.0
LOCK_LOST = 2000.0
_SECONDS = 60.0


class StopRequests:
    """Reasons to stop that this process knows; a context manager that handles signals inside.

    `config` is the config section `train`; `locks` are those of the run's folders, on the main
    rank. Outside the main thread of a process signals cannot be heard. SIGHUP, which tells that the
    terminal is gone, stays ignored under `nohup`.
    """

    def __init__(self, config: TrainConfig, launch: DistEnv, locks: RunLocks | None = None) -> None:
        self._locks = locks
        self._signals = SIGNALS if config.exit_signal_handler else ()
        self._deadline = deadline(config, launch)
        self._received = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        heard = [n for n in self._signals if signal.getsignal(n) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> float:
        """0 to go on, the number of a signal, `TIME_IS_OVER` or `LOCK_LOST`; what ranks compare."""
        if self._locks is not None and self._locks.lost:
            return LOCK_LOST
        if self._received:
            return float(self._received)
        return TIME_IS_OVER if time.time() >= self._deadline else 0.0

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number


def describe(reason: float) -> str:
    """The reason in words."""
    if reason == TIME_IS_OVER:
        return "train.exit_duration_in_mins is over"
    return f"received {signal.Signals(int(reason)).name}"


def describe_stop(reason: float, config: CheckpointConfig, launch: DistEnv, iteration: int) -> str:
    """Why a run has stopped and saved after `iteration`, and how it goes on."""
    where = f" {describe(reason)}: stopped after iteration {iteration}"
    if config.save is None:
        return f"{where}; nothing is saved without checkpoint.save"
    return where if config.resumes else f"{where}; to go on: {command_to_go_on(config, launch)}"


def exit_code(reason: float, resumes: bool) -> int:
    """The code of a run that stopped for `reason`: `EXIT_RESTART` promises that it goes on.

    If the same command would not continue the run: 128 + n for signal n, 0 for the end of its time.
    """
    if resumes:
        return EXIT_RESTART
    return 0 if reason == TIME_IS_OVER else 128 + int(reason)


def is_over(config: TrainConfig, launch: DistEnv) -> bool:
    """Whether torchrun has started this process again after the job's time was over."""
    return launch.restart > 0 and time.time() >= deadline(config, launch)


def deadline(config: TrainConfig, launch: DistEnv) -> float:
    """Unix time at which the job's time is over, of the config section `train`; or never."""
    if config.exit_duration_in_mins is None:
        return math.inf
    return job_started(launch) + _SECONDS * config.exit_duration_in_mins


def job_started(launch: DistEnv) -> float:
    """Unix time at which the job started: that of the launcher, which may have restarted this."""
    process = psutil.Process()
    parent = process.parent() if launch.by_launcher else None
    return (parent or process).create_time()


def describe_interruption(config: CheckpointConfig, launch: DistEnv, iteration: int) -> str:
    """For a run that ends after `iteration` without saving."""
    if config.save is None:
        return f"after iteration {iteration}; nothing is saved without checkpoint.save"
    try:
        saved = latest_iteration(config.save)
    except (InputError, OSError):
        saved = None
    if saved is None:
        return f"after iteration {iteration}; there is no checkpoint in {config.save} yet"
    lost = max(0, iteration - saved)
    return (
        f"after iteration {iteration}; the last checkpoint is of iteration {saved} in "
        f"{config.save} ({lost} iteration{'s' * (lost != 1)} lost); to go on: "
        f"{command_to_go_on(config, launch)}"
    )


def command_to_go_on(config: CheckpointConfig, launch: DistEnv) -> str:
    """The command that starts from what this one has saved in `config.save`."""
    more = [] if config.resumes else [f"checkpoint.load={config.save}"]
    if launch.by_launcher:  # which was given its own command line
        return " with ".join(["the same command", *more])
    return shlex.join([*sys.orig_argv, *more])
