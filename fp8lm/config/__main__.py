"""`python -m fp8lm.config`: the JSON schema, or the resolved config of a command line."""

from __future__ import annotations

import sys
from typing import NoReturn

from fp8lm.config.command_line import main
from fp8lm.runtime.errors import run_command


def command() -> NoReturn:
    """Run it as this process's command."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    command()
