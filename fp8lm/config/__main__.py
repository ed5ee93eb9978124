"""`python -m fp8lm.config`: the JSON schema, or the resolved config of a command line."""

from __future__ import annotations

import sys

from fp8lm.config.command_line import main
from fp8lm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
