"""Failures of the machine, not of the program: memory, disks, open files, processes."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from types import TracebackType

_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory")  # as PyTorch and libc say it
_TOO_MANY_FILES = "Too many open files"  # C++ libraries tell errno by its text only
_NO_THREAD = "can't start new thread"
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
        if _is_out_of_memory(cause):
            return f"out of memory{_place(cause.__traceback__)}: {_first_line(cause)}"
        if _is(cause, errno.EMFILE, errno.ENFILE) or _TOO_MANY_FILES in str(cause):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"too many open files: {limit} are allowed here: raise it with ulimit -n"
        if _cannot_fork(cause) or _NO_THREAD in str(cause):
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            limit = "unlimited" if limit == resource.RLIM_INFINITY else limit
            return (
                f"cannot start another process or thread{_place(cause.__traceback__)}: "
                f"ulimit -u is {limit}; or the limit of the container or job"
            )
    if isinstance(error, OSError) and error.errno in _OF_A_FILE:
        what = error.filename if error.filename is not None else "a file"
        return f"{what}: {error.strerror}{_place(error.__traceback__)}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is(error: BaseException, *numbers: int) -> bool:
    return isinstance(error, OSError) and error.errno in numbers


def _cannot_fork(error: BaseException) -> bool:
    # What a pipe that would block says has the same number, and other words.
    return _is(error, errno.EAGAIN) and error.strerror == os.strerror(errno.EAGAIN)


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
        if module.startswith("fp8lm.") and module != "fp8lm.errors":  # which catches it
            place = f" (in {module}.{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
