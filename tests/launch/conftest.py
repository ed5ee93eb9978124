"""Starting the project's launchers as a user would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"FP8LM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
PATIENCE = 300  # seconds; only what hangs takes so long, also on a busy machine


class Job:
    """A launched job; its output is in `log`."""

    def __init__(self, command, log, **environment):
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def output(self):
        return self._log.read_text(errors="replace")

    def wait_for(self, text):
        """Return the match of the pattern `text` in the output, once it is there."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if found := re.search(text, self.output):
                return found
            assert not ended, self.output
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def finish(self):
        """The exit code."""
        return self.process.wait(PATIENCE)


@pytest.fixture
def launch(tmp_path):
    """`launch(command, name)`: a job, which does not outlive the test."""
    jobs = []

    def start(command, name="job", **environment):
        jobs.append(Job(command, tmp_path / f"{name}.log", **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
            try:
                job.process.wait(20)
            except subprocess.TimeoutExpired:
                job.process.kill()


def reports(folder):
    """All that a run reported and that does not measure time or memory."""
    timing = {"iteration-time", "throughput", "tokens-per-second", "timestamp"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: v for key, v in json.loads(line).items() if key not in timing and "memory" not in key}
        for line in lines
    ]


def tool(folder, name, text):
    """An executable file of this content; its path."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)
