"""Blocks that were freed go back to the system, or not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT

PAGES = 2048  # of a tensor of 8 MiB
PROGRAM = """
import resource, sys, torch
from fp8lm.runtime import allocator
getattr(allocator, sys.argv[1])()
x = torch.zeros(2**21)

def step():
    y = x * 2
    return (y + 1).sum()

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc does")
@pytest.mark.parametrize(
    "function, least, most",
    [("keep_freed_blocks", 0, 12 * PAGES), ("return_large_blocks", 80 * PAGES, 100 * PAGES)],
)
def test_pages_taken_by_forty_steps_of_two_large_tensors(function, least, most):
    command = [sys.executable, "-c", PROGRAM, function]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
