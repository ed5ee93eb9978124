"""The job's exit code from those of its workers; torchrun itself only knows 0 and 1."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from fp8lm.runtime.errors import EXIT_BAD_INPUT, EXIT_RESTART

# A cluster's ways to say that the job's time is over, and a lost terminal: workers save, and the
# job goes on later.
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def job_exit_code(codes: Sequence[int]) -> int:
    """The code of a job whose workers ended with `codes` (not 0, first failure first; -n: signal).

    Bad input on any worker is bad input, and a worker that says that all is saved is right: others
    may have been stopped by then. Otherwise the first failure counts, as a shell says it.
    """
    for code in (EXIT_BAD_INPUT, EXIT_RESTART):
        if code in codes:
            return code
    return 128 - codes[0] if codes[0] < 0 else codes[0]


def signal_exit_code(number: int, codes: Sequence[int], workers: int) -> int:
    """The code of a job whose launcher received a signal and passed it on to `workers`.

    `codes` are those that they left: a worker that was killed or failed left none, and then not all
    is saved.
    """
    if failed := [code for code in codes if code not in (0, EXIT_RESTART)]:
        return job_exit_code(failed)
    saved = number in WARNINGS and len(codes) >= workers
    return EXIT_RESTART if saved else 128 + number


def describe_exit(code: int) -> str:
    """An exit code in words; -n: signal n."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
