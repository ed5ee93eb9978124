"""Hold a folder for a script of this machine, until it ends or removes the folder's run.lock.

python -m fp8lm.runtime.hold FOLDER PID COMMAND
"""

from __future__ import annotations

import os
import sys

from fp8lm.runtime.errors import InputError, run_command
from fp8lm.runtime.holder import this_process
from fp8lm.runtime.run_lock import RunFolder, RunLocks


def main(argv: list[str]) -> None:
    """Lock FOLDER for the process PID, which runs COMMAND; `FolderInUse` if another has it.

    Without a heartbeat: processes of this machine see that PID runs, those of others do not.
    """
    if len(argv) != 3 or not argv[1].isdecimal() or not 0 < int(argv[1]) < 2**31:
        raise InputError("usage: python -m fp8lm.runtime.hold FOLDER PID COMMAND")
    folder, pid, command = argv
    holder = this_process(os.environ, [command], int(pid))
    RunLocks(holder).take([RunFolder(folder, folder, f"{folder} cannot be written to")])


if __name__ == "__main__":
    sys.exit(run_command(main))
