"""How the process of a command ends."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from fp8lm.runtime.errors import EXIT_FAILED, run_command


def exit_with(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main` as a command (see `run_command`), and end this process with its exit code.

    A process that failed beside others still has its process groups. It ends without destroying
    them: NCCL waits there for the other ranks, which wait for this one in a collective, and the
    launcher could not start the job again before their timeout.
    """
    try:
        code = run_command(main)
    except Exception:
        with suppress(OSError, ValueError):
            traceback.print_exc()
        code = EXIT_FAILED
    if not _has_groups():
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _has_groups() -> bool:
    distributed = sys.modules.get("torch.distributed")  # a command may not have come to import it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
