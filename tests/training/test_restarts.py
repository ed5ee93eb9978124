"""Jobs under torchrun that are killed: they resume by themselves, or when started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fp8lm.checkpoint import latest_iteration

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = ["model.num_layers=2", "train.global_batch_size=8", "train.eval_iters=1"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_when_workers_are_killed(tmp_path):
    """Once between saves and once in one; torchrun starts the workers anew, which resume."""
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/chaos.py", "--kills=2", "--victim=worker"]
    command += [f"--folder={tmp_path}", f"--output={report}", "--save-interval=4", *SMALL]
    command += ["train.train_iters=60", "checkpoint.async_save=true"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert len(result["kills"]) == 2 and result["kills"][1]["in_save"]
    assert result["lost"] == [] and result["final"]["iteration"] == 60


@pytest.mark.slow
def test_a_warning_of_the_cluster_reaches_all_through_torchrun(tmp_path):
    """SIGTERM to torchrun is one to its workers, who save, and to those that load their batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "pretrain_gpt.py"]
    command += ["--config=configs/gpt_tiny.yaml", "train.train_iters=100000", *SMALL]
    command += [f"checkpoint.save={tmp_path}", "logging.log_interval=1", "data.num_workers=1"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        job = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while "iteration        3/" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(job.pid).children()
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) != 0
    assert not psutil.wait_procs(workers, timeout=60)[1]
    text = log.read_text()
    assert f"received SIGTERM: stopped after iteration {latest_iteration(tmp_path)}" in text
    assert latest_iteration(tmp_path) >= 3
