"""Several machines on this one: they train together, and one may be killed."""

from __future__ import annotations

import os
import signal

import pytest

from fp8lm.config import load_config
from tests.launch.conftest import ROOT, reports
from tests.training.runs import train

CONFIG = "configs/gpt_tiny.yaml"
SMALL = ["model.num_layers=2", "train.eval_iters=0", "train.train_iters=40"]
pytestmark = pytest.mark.slow


def overrides(folder):
    kept = [f"checkpoint.{key}={folder}/checkpoints" for key in ("save", "load")]
    return [*SMALL, *kept, "checkpoint.save_interval=5", f"logging.dir={folder}"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("nodes", "victim"), [(2, 1), (4, 0)])
def test_a_killed_node_is_replaced_and_nothing_is_lost(
    launch, run_distributed, tmp_path, nodes, victim
):
    """Every report equals that of as many processes that nothing happened to."""
    command = ["scripts/train_multinode.sh", "--simulate", nodes, CONFIG]
    job = launch([*command, *overrides(tmp_path / "killed")])
    agent = int(job.wait_for(rf"node {victim}: process (\d+)")[1])
    job.wait_for(r"iteration +7/")
    os.kill(agent, signal.SIGKILL)
    run_distributed(train, nodes, load_config(ROOT / CONFIG, overrides(tmp_path / "calm")))
    assert job.finish() == 0, job.output
    assert f" node {victim} was killed by SIGKILL: another takes its place" in job.output
    assert "loaded checkpoint" in job.output
    expected = reports(tmp_path / "calm")
    assert reports(tmp_path / "killed") == expected
    assert [line["iteration"] for line in expected] == list(range(1, 41))
