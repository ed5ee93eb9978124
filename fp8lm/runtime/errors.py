"""Errors that a user can fix, and how a command reports them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from fp8lm.runtime.faults import describe_fault
from fp8lm.runtime.output import EXIT_UNREAD, finish_output, nobody_reads
from fp8lm.runtime.streams import complain, open_missing_streams

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
PATIENCE = 5.0  # seconds; a launcher ends all processes of a job sooner when one has failed
EXIT_RESTART = 75  # sysexits.h's "temporary failure": all is saved, start the same command again
ENDS = "FP8LM_ENDS"  # environment variable: a folder in which processes leave their exit codes
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell has it


class InputError(Exception):
    """Bad config, data, tokenizer, checkpoint or environment: names the thing and the cure.

    `exit_code` is that of a command which it ends.
    """

    exit_code = EXIT_BAD_INPUT


class FolderInUse(InputError):
    """A process of this machine writes to a folder that a run would write to."""


class FolderInUseElsewhere(FolderInUse):
    """A run that may end, or be found dead, holds the folder: the same command may start later."""

    exit_code = EXIT_RESTART


class LockLost(InputError):
    """Another run has taken a folder over from this one, which must not write there any more."""


class RunFailed(Exception):
    """A run that cannot go on although its command is right: says what happened and what is kept.

    One line on stderr and exit code 1, which asks neither for a correction nor for a restart.
    """


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are `InputError`, in one line.

    `--option=~/FILE` means what `--option ~/FILE` does: only the latter is expanded by shells.
    """

    def option_names(self) -> list[str]:
        """All options, as they are written: `--config`."""
        return list(self._option_string_actions)

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """See argparse, which every way of parsing ends in."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_home(text) for text in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise InputError(f"{message}; see {self.prog} --help")


def _with_home(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name + equals + os.path.expanduser(value) if value.startswith("~/") else argument


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: an `InputError` is one line on stderr and its code.

    So are a missing package, Ctrl-C with code 130, and with code 1 a `RunFailed` and whatever the
    machine lacks (see `faults`). Output that nobody reads any more (`| head`) ends it with 141.
    `argv` defaults to the arguments of this process. Any other exception passes through, because a
    traceback is what a failure of the program itself needs.
    """
    open_missing_streams()
    leave_exit_code(None)
    code = _run(main, list(sys.argv[1:] if argv is None else argv))
    nobody_reads()  # or Python complains, when it flushes at its end
    leave_exit_code(code)
    return code


def leave_exit_code(code: int | None) -> None:
    """Leave the exit code for the launcher: torchrun drops those of workers it has signalled.

    None, at the start of a worker, takes back what the one in its place before it has left. Ranks
    may change when workers are started again, places on the machine do not.
    """
    if folder := os.environ.get(ENDS):
        with suppress(OSError):
            text = "" if code is None else str(code)
            Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(text, encoding="utf-8")


def _run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        return _run_to_the_end_of_output(main, argv)
    except InputError as error:
        return _fail(str(error), error.exit_code)
    except RunFailed as error:
        return _fail(str(error), EXIT_FAILED)
    except ModuleNotFoundError as error:
        if (error.name or "fp8lm").startswith("fp8lm"):
            raise
        cure = "source .venv/bin/activate, or python -m fp8lm.doctor"
        complain(f"error: {sys.executable} has no package {error.name}: {cure}")
        return EXIT_BAD_INPUT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return EXIT_UNREAD
        fault = describe_fault(error)
        if fault is None:
            raise
        return _fail(fault, EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)  # what was under way ends here, silently
        if os.environ.get("RANK", "0") == "0":
            complain(": ".join(["interrupted", *map(str, interrupt.args)]))
        return EXIT_INTERRUPTED


def _run_to_the_end_of_output(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        code = main(argv) or 0
    except SystemExit:  # of --help
        finish_output()
        raise
    problem = finish_output()
    if problem is None:
        return code
    complain(f"error: {problem}")
    return code or EXIT_FAILED


def _fail(message: str, code: int) -> int:
    _let_the_first_speak()
    complain(f"error: {' '.join(message.split())}")
    return code


def _let_the_first_speak() -> None:
    """Ranks mostly find the same thing wrong: the others are ended while they wait here.

    What only one of them has found is said a little later.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE)
