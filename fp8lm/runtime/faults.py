"""Failures of the machine, not of the program: memory, disks, open files, data workers."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from types import TracebackType

_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory")  # as PyTorch and libc say it
_TOO_MANY_FILES = "Too many open files"  # C++ libraries tell errno by its text only
_NO_THREAD = "can't start new thread"
SHARED_MEMORY = "/dev/shm"
# What PyTorch says of its data workers.
_NO_SHARED_MEMORY = re.compile(r"unable to (\w+ shared memory|resize file </torch_)")
_WORKER_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]*)\.")
_WORKER_EXITED = re.compile(r"DataLoader worker \(pid\S* ([\d, ]+)\) exited unexpectedly")
# What gloo and NCCL say of a rank that has ended, to those that wait for it.
_PEER_LOST = re.compile(r"Connection (closed|reset) by peer|remote process exited")
_OF_A_FILE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.EISDIR,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}


def describe_fault(error: BaseException) -> str | None:
    """What the machine lacks, and the cure; None for any other failure.

    Causes count, as libraries wrap what the system told them.
    """
    for cause in _chain(error):
        if worker := _describe_worker(str(cause)):
            return worker
        if _is_out_of_memory(cause):
            return f"out of memory{_place(cause.__traceback__)}: {_first_line(cause)}"
        if _is(cause, errno.EMFILE, errno.ENFILE) or _TOO_MANY_FILES in str(cause):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"too many open files: {limit} are allowed here: raise it with ulimit -n"
        if _cannot_fork(cause) or _NO_THREAD in str(cause):
            most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            allowed = "unlimited" if most == resource.RLIM_INFINITY else most
            return (
                f"cannot start another process or thread{_place(cause.__traceback__)}: "
                f"ulimit -u is {allowed}; or the limit of the container or job"
            )
    if isinstance(error, RuntimeError) and (lost := _PEER_LOST.search(str(error))):
        return f"lost another rank ({lost[0]}), whose own message says why it ended"
    if isinstance(error, OSError) and error.errno in _OF_A_FILE:
        what = error.filename if error.filename is not None else "standard output, or a file"
        return f"{what}: {error.strerror}{_place(error.__traceback__)}"
    return None


def _describe_worker(text: str) -> str | None:
    """What `text`, PyTorch's words for the end of a data worker, says of the machine."""
    if _NO_SHARED_MEMORY.search(text):
        return describe_full_shared_memory()
    if (found := _WORKER_KILLED.search(text)) and found[2].startswith("Bus error"):
        return (
            f"a data worker (process {found[1]}) was killed by a bus error: a token file was cut "
            f"while in use, or {describe_full_shared_memory()}"
        )
    if found:
        return (
            f"a data worker (process {found[1]}) was killed ({found[2]}), mostly for want of "
            "memory: fewer data.num_workers (0: none), or more memory"
        )
    if found := _WORKER_EXITED.search(text):
        return (
            f"a data worker (process {found[1]}) ended before its work: its own message stands "
            "above, or try data.num_workers=0"
        )
    return None


def describe_full_shared_memory() -> str:
    """That data workers find no room in it, and the cures."""
    try:
        space = shutil.disk_usage(SHARED_MEMORY)
        room = f" ({SHARED_MEMORY}: {space.free >> 10} of {space.total >> 10} KiB free)"
    except OSError:
        room = ""
    return (
        f"no shared memory is left for the data workers{room}: data.num_workers=0, or a larger "
        f"{SHARED_MEMORY} (docker run --shm-size=8g)"
    )


def describe_unusable_shared_memory(error: OSError) -> str:
    """That data workers cannot use it, and the cures."""
    return (
        f"the data workers cannot use shared memory ({SHARED_MEMORY}: {error.strerror}): "
        f"data.num_workers=0, or a {SHARED_MEMORY} that this user can write to"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is(error: BaseException, *numbers: int) -> bool:
    return isinstance(error, OSError) and error.errno in numbers


def _cannot_fork(error: BaseException) -> bool:
    # What a pipe that would block says has the same number, and other words.
    if not isinstance(error, OSError) or error.errno != errno.EAGAIN:
        return False
    return error.strerror == os.strerror(errno.EAGAIN)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _is(error, errno.ENOMEM):
        return True
    # By name: torch is not imported here.
    named = type(error).__name__ == "OutOfMemoryError"
    return named or any(text in str(error) for text in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["the machine has no more to give"])[0]


def _place(trace: TracebackType | None) -> str:
    """` (in MODULE.FUNCTION, line N)`: the innermost function of this package, if there is one."""
    place = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith("fp8lm.") and module != "fp8lm.runtime.errors":  # which catches it
            place = f" (in {module}.{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
