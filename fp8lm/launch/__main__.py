"""`python -m fp8lm.launch`: check a run, show its layout, start it."""

from __future__ import annotations

import sys
from typing import NoReturn

from fp8lm.launch.main import main
from fp8lm.runtime.errors import run_command


def command() -> NoReturn:
    """Run it as this process's command."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    command()
