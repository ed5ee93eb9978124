"""`python -m fp8lm.launch`: check a run, show who will hold what, start it."""

from __future__ import annotations

import sys

from fp8lm.errors import run_command
from fp8lm.launch.main import main

if __name__ == "__main__":
    sys.exit(run_command(main))
