"""Training jobs whose processes are forked from a server that has imported everything.

A process of pretrain_gpt.py spends seconds on imports; one that is forked after them starts in
milliseconds. For programs that train many tiny models one after the other:

    with JobServer(tree) as server:
        result = server.run(["--config", "configs/gpt_tiny.yaml"], processes=2, log=path)

`tree` is a checkout, of any commit whose pretrain_gpt.py has `main(argv) -> int`: the server is an
interpreter of its own, so several commits can be run side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

POLL = 0.005
GRACE = 10.0  # seconds that the other ranks have when one has failed
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_IMPORTS = (
    "fp8lm.training.trainer",
    "fp8lm.training.hooks",
    "fp8lm.training.build",
    "fp8lm.comm.groups",
    "fp8lm.config",
    "megatron.core.optimizer_param_scheduler",
    "torch.distributed.checkpoint",
)


@dataclass(frozen=True)
class Kill:
    """SIGKILL to all ranks `seconds` after `file` has at least `lines` lines."""

    file: str
    lines: int
    seconds: float


@dataclass(frozen=True)
class JobResult:
    """Exit codes by rank (negative: a signal); whether `Kill` was carried out, or time was up."""

    codes: list[int]
    killed: bool
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether every rank ended well."""
        return not any(self.codes)

    def __str__(self) -> str:
        return f"ended with {self.codes}" + ", time was up" * self.timed_out


class JobServer:
    """Runs jobs of the code in `tree`; a context manager."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree.resolve()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> JobServer:
        environment = {**os.environ, "PYTHONPATH": str(self._tree), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self._tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._tree,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        process, requests, _answers = self._running()
        requests.close()
        if process.poll() is None:
            process.terminate()
        process.wait()

    def _running(self) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
        """The server, where it takes requests and where it answers."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the server runs inside a with block only")
        return process, process.stdin, process.stdout

    def run(
        self,
        argv: Sequence[str],
        processes: int,
        log: Path,
        kill: Kill | None = None,
        timeout: float = 300.0,
    ) -> JobResult:
        """Run pretrain_gpt.py with `argv` on `processes` ranks; their output goes to `log`.

        After `timeout` seconds all ranks are killed. RuntimeError if the server has ended.
        """
        request = {
            "argv": list(argv),
            "processes": processes,
            "log": str(log),
            "kill": asdict(kill) if kill else None,
            "timeout": timeout,
        }
        _process, requests, answers = self._running()
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the server for {self._tree} has ended") from None
        if not (answer := answers.readline()):
            raise RuntimeError(f"the server for {self._tree} has ended")
        return JobResult(**json.loads(answer))


def serve(tree: str) -> None:
    """Answer requests of a `JobServer`, one JSON object a line."""
    _die_with_parent()
    sys.path.insert(0, tree)
    command = _import_command(Path(tree))
    for line in sys.stdin:
        result = _run(command, json.loads(line))
        print(json.dumps(asdict(result)), flush=True)


def _import_command(tree: Path) -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("pretrain_gpt", tree / "pretrain_gpt.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{tree}/pretrain_gpt.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Megatron-core tells of every optional package that it does not find.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
        for name in _IMPORTS:
            with contextlib.suppress(ModuleNotFoundError):  # another commit may have moved it
                importlib.import_module(name)
    return module.main


def _run(command: Callable[[list[str]], int], request: dict[str, Any]) -> JobResult:
    port = _free_port()
    ranks = [_fork(command, request, rank, port) for rank in range(request["processes"])]
    kill = Kill(**request["kill"]) if request["kill"] else None
    due = deadline = limit = time.monotonic() + request["timeout"]
    if kill is None:
        due = float("inf")
    codes: dict[int, int] = {}
    armed = killed = timed_out = False
    while len(codes) < len(ranks):
        codes |= _reap([pid for pid in ranks if pid not in codes])
        now = time.monotonic()
        if kill is not None and not armed and _lines(kill.file) >= kill.lines:
            armed, due = True, now + kill.seconds
        if any(codes.values()):
            deadline = min(deadline, now + GRACE)
        if now >= min(due, deadline) and len(codes) < len(ranks):
            killed = killed or (armed and now >= due)
            timed_out = now >= limit
            due = float("inf")
            for pid in ranks:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL)
    return JobResult([codes[pid] for pid in ranks], killed, timed_out)


def _fork(
    command: Callable[[list[str]], int], request: dict[str, Any], rank: int, port: int
) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _die_with_parent()
        _redirect(request["log"])
        random.seed()
        if request["processes"] > 1:
            os.environ |= _rank_environment(rank, request["processes"], port)
        from fp8lm.runtime.errors import run_command

        code = run_command(command, request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    values |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in values.items()}


def _redirect(log: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptor = os.open(log, flags, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (descriptor, 1), (descriptor, 2)):
        os.dup2(source, target)


def _reap(pids: list[int]) -> dict[int, int]:
    ended = {}
    for pid in pids:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _lines(file: str) -> int:
    with contextlib.suppress(OSError):
        return Path(file).read_bytes().count(b"\n")
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
