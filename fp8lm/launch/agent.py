"""torchrun in this process, with an exit code that means something.

python -m fp8lm.launch.agent ARGUMENTS OF TORCHRUN

    0     done                          2     bad input
    75    all workers have saved: the same command goes on
    other, 128 + n                      the first worker's failure, or death by signal n

torchrun restarts its workers (`--max-restarts`) whatever they ended with. It has no way to be told
that 2 is final, so what can be checked is checked before: see `preflight`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from fp8lm.launch.exits import WARNINGS, describe_exit, job_exit_code, signal_exit_code
from fp8lm.launch.lost_link import is_running, watch_meeting
from fp8lm.runtime.errors import ENDS
from fp8lm.runtime.parent_death import tie_children, tie_to_parent
from fp8lm.runtime.streams import complain

TAIL = 20  # lines


def run_agent(arguments: Sequence[str]) -> int:
    """Run torchrun to its end; the job's exit code. Call it in the main thread.

    On a signal torchrun passes it on to the workers' process groups, waits for
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30 in torch 2.11) and kills what is left.
    """
    with tempfile.TemporaryDirectory(prefix="fp8lm_") as ends:
        os.environ[ENDS] = ends
        tie_children(os.environ)
        return _run(_leave_nohup(arguments), Path(ends))


def _leave_nohup(arguments: Sequence[str]) -> Sequence[str]:
    """Arguments with which torchrun does not answer SIGHUP where `nohup` has ignored it."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        return arguments
    handled = parse_args(list(arguments)).signals_to_handle.split(",")
    return ["--signals-to-handle=" + ",".join(s for s in handled if s != "SIGHUP"), *arguments]


def _run(arguments: Sequence[str], ends: Path) -> int:
    _watch_link(arguments, ends)
    for number in WARNINGS:  # until torchrun has workers, and handlers of its own
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        _run_deaf_at_the_end(arguments)
    except ChildFailedError as error:
        _tell(error, parse_args(list(arguments)).log_dir)
        return job_exit_code([failure.exitcode for failure in _in_time(error)])
    except SignalException as error:
        workers = int(parse_args(list(arguments)).nproc_per_node)
        return signal_exit_code(error.sigval, _last_codes(ends), workers)
    except (RendezvousError, DistError) as error:
        where = parse_args(list(arguments)).rdzv_endpoint
        started = any(ends.iterdir())
        complain(f"error: {_describe_parting(error, where, started)}")
        return 1
    return 0


def _watch_link(arguments: Sequence[str], ends: Path) -> None:
    parsed = parse_args(list(arguments))
    if parsed.nnodes in ("1", "1:1"):
        return

    def leave() -> None:
        where = f"the connection to {parsed.rdzv_endpoint} is lost"
        complain(f"error: {where}: this machine or the one there is cut off")
        shutil.rmtree(ends, ignore_errors=True)
        os._exit(1)  # torchrun does not listen: it waits for an answer

    def is_idle() -> bool:
        with suppress(FileNotFoundError):  # at the end of `run_agent`
            return any(ends.iterdir()) and not any(map(is_running, psutil.Process().children()))
        return False

    watch_meeting(parsed.rdzv_endpoint, is_idle, leave)


def _run_deaf_at_the_end(arguments: Sequence[str]) -> None:
    try:
        torchrun(list(arguments))
    finally:  # the end is known, and another signal would make a traceback of it
        for name in parse_args(list(arguments)).signals_to_handle.split(","):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _describe_parting(error: Exception, where: str, started: bool) -> str:
    """Why this node is without the others; `started`: they had met, and it had workers."""
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the job: its output says why"
    cause = type(error).__name__
    if not started:
        return f"the nodes did not meet at {where} ({cause})"
    if isinstance(error, RendezvousTimeoutError):
        return f"a lost node was not replaced in time: the nodes did not meet again at {where}"
    return f"the connection to {where} is lost: the node there has ended or is cut off ({cause})"


def _last_codes(ends: Path) -> list[int]:
    """What the workers of the last start ended with, as far as they could say."""
    left = [file.read_text() for file in ends.iterdir()]
    return [int(code) for code in left if code]  # empty: started, and not ended by itself


def _raise(number: int, _frame: FrameType | None) -> None:
    raise SignalException(f"received signal {number}", signal.Signals(number))


def _in_time(error: ChildFailedError) -> list:
    return sorted(error.failures.values(), key=lambda failure: failure.timestamp)


def _tell(error: ChildFailedError, log_dir: str | None) -> None:
    rank, failure = error.get_first_failure()
    complain(f"error: rank {rank} {describe_exit(failure.exitcode)}")
    log = _last_log(log_dir, failure.local_rank)
    if log is not None and failure.local_rank:  # the console shows local rank 0 anyway
        lines = log.read_text(errors="replace").splitlines()
        complain("\n".join([f"the last lines of {log}:", *lines[-TAIL:]]))


def _last_log(log_dir: str | None, local_rank: int) -> Path | None:
    if log_dir is None:
        return None
    found = Path(log_dir).glob(f"*/attempt_*/{local_rank}/stderr.log")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    tie_to_parent()
    sys.exit(run_agent(sys.argv[1:]))
