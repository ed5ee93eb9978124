"""What the machine lacks is one line and exit code 1; a failure of the program is a traceback."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from fp8lm.runtime.errors import EXIT_FAILED, RunFailed, run_command
from tests.bad_input.cases import ROOT, TINY


def failing(error):
    def main(argv):
        raise error

    return main


def wrapped(error):
    try:
        raise RuntimeError("a library's own words") from error
    except RuntimeError as outer:
        return outer


FAULTS = {
    "a failed run": (RunFailed("the loss is\nlost"), "the loss is lost"),
    "memory": (MemoryError(), "out of memory"),
    "memory, PyTorch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "memory: D"),
    "memory, GPU": (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "memory: CUDA"),
    "memory, wrapped": (wrapped(OSError(errno.ENOMEM, "Cannot allocate memory")), "out of memory"),
    "files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    "files, C++": (RuntimeError("epoll_create: Too many open files"), "ulimit -n"),
    "processes": (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
    "threads": (RuntimeError("can't start new thread"), "ulimit -u"),
    "another rank": (RuntimeError("gloo: Connection closed by peer [::1]:9"), "lost another rank"),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space"),
    "folder": (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission"),
}


@pytest.mark.parametrize(("error", "says"), FAULTS.values(), ids=FAULTS)
def test_what_the_machine_lacks_is_one_line(error, says, capsys):
    assert run_command(failing(error), []) == EXIT_FAILED
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err and out == ""


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyError("memory"), OSError("x"), ConnectionResetError(104, "")],
)
def test_what_the_program_does_wrong_is_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(failing(error), [])


def test_the_place_is_named_where_memory_ends(capsys):
    def main(argv):
        from fp8lm.data.batches import MicroBatchSampler

        class Hungry:
            def __sub__(self, other):
                raise MemoryError

        MicroBatchSampler(Hungry(), 1, 0, 1, 0)

    assert run_command(main, []) == EXIT_FAILED
    assert "(in fp8lm.data.batches.__init__, line " in capsys.readouterr().err


@pytest.mark.slow
def test_too_few_open_files_name_the_limit():
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))

    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *TINY, "train.train_iters=1"]
    ended = subprocess.run(command, preexec_fn=few_files, capture_output=True, text=True)
    assert ended.returncode == EXIT_FAILED
    assert "error: too many open files: 12 are allowed" in ended.stderr
    assert "Traceback" not in ended.stderr
