"""A comparison that is interrupted and started again is that of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fp8lm.checkpoint import latest_iteration
from tests.launch.conftest import ENVIRONMENT, PATIENCE, ROOT
from tests.tools.test_compare_recipes import CONFIG, TINY

ITERATIONS = 60
# Time enough to be interrupted in, on a machine of any speed.
LONGER = (
    f"train.train_iters={ITERATIONS}",
    "checkpoint.save_interval=20",
    "logging.fp8_stats_interval=1000",
)


def command(output, *recipes):
    named = ("--config", CONFIG, "--output", output, "--recipes", *recipes)
    return [*map(str, named), *TINY, *LONGER]


@pytest.fixture
def start(tmp_path):
    """The tool as a process of its own; what it starts does not outlive it."""
    jobs = []

    def run(output, *recipes):
        tool = [sys.executable, "tools/compare_recipes.py", *command(output, *recipes)]
        with (tmp_path / "tool.txt").open("a") as log:
            streams = {"stdout": log, "stderr": log, "start_new_session": True}
            jobs.append(subprocess.Popen(tool, cwd=ROOT, env=ENVIRONMENT, **streams))
        return jobs[-1]

    yield run
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def reported(folder):
    """The iteration of the last whole line of its reports."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    return json.loads(whole.splitlines()[-1])["iteration"]


def wait_for_steps_to_lose(folder, job):
    """Until steps after the first checkpoint have been reported."""
    deadline = time.monotonic() + PATIENCE
    while (saved := latest_iteration(folder / "checkpoints")) is None or reported(folder) <= saved:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_validation_losses_of_a_comparison_left_alone(start, run_tool, tmp_path):
    """Ctrl-C ends the tool and its training, which repeats the steps after its checkpoint."""
    output, folder = tmp_path / "interrupted", tmp_path / "interrupted" / "o3-1"
    job = start(output, "o3", "te")
    wait_for_steps_to_lose(folder, job)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(PATIENCE) != 0
    assert latest_iteration(folder / "checkpoints") < ITERATIONS
    assert not json.loads((folder / "recipe.json").read_text())["done"]
    assert not (output / "summary.json").exists()
    assert not (output / "te-1").exists()  # what waits is not begun
    summaries = []
    for name in (output, tmp_path / "calm"):
        assert run_tool("compare_recipes", *command(name, "o3")) == 0
        summaries.append(json.loads((name / "summary.json").read_text())["o3"])
    assert "loaded checkpoint of iteration" in (folder / "log.txt").read_text()
    for key in ("iterations", "untrained validation loss", "validation losses"):
        assert summaries[0][key] == summaries[1][key]
