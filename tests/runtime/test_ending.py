"""How a command ends: with output that nobody reads or that cannot be written, and in a job."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch.distributed as dist

from fp8lm.comm.groups import model_parallel_groups
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import InputError
from tests.bad_input.cases import ROOT

LONG = 60.0
WORK = """
import sys
from fp8lm.runtime.errors import run_command
sys.exit(run_command(lambda argv: [print("half"), print("done", file=sys.stderr)]))
"""


@pytest.mark.parametrize("arguments", [["--schema"], ["--help"]])
def test_a_reader_may_leave(arguments):
    """As in `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fp8lm.config", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_work_whose_reader_has_left_is_not_done():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-uc", WORK]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has that device")
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fp8lm.config", "--schema"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr


def failing_command(error):
    """Rank 1 fails while the other one is at work."""

    def main(argv):
        with model_parallel_groups():
            if dist.get_rank() == 0:
                time.sleep(LONG)
            raise error

    # What waits for the other rank: destroying groups, and whatever the interpreter does last.
    atexit.register(time.sleep, LONG)
    with mock.patch.object(dist, "destroy_process_group", lambda *_: time.sleep(LONG)):
        exit_with(main)


@pytest.mark.parametrize(("error", "code"), [(InputError("bad"), 2), (ValueError("a bug"), 1)])
def test_a_rank_that_fails_waits_for_no_other(run_distributed, error, code):
    with pytest.raises(RuntimeError, match=f"rank 1 of 2 died: exit code {code}"):
        run_distributed(failing_command, 2, error, timeout=LONG / 2)
