"""scripts/slurm.sbatch against a SLURM that is only pretended."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.launch.conftest import ENVIRONMENT, ROOT, tool

pytestmark = pytest.mark.slow

# A training that ends with the code in $CODE; with $WAIT it waits for SLURM's warning and saves.
SRUN = """#!/usr/bin/env bash
echo "srun: $*"
echo "at $MASTER_ADDR:$MASTER_PORT, logs in $LOG_DIR"
if [[ -n ${WAIT:-} ]]; then
  trap 'echo saved; exit 75' USR1
  trap 'echo killed; exit 137' TERM
  echo waiting
  for _ in {1..100}; do sleep 0.1; done
fi
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
[[ ${FAILS:-} != "$1" ]] || exit 1
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "scontrol: $*"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job in a SLURM of two stubs; the checkout is a copy of scripts/."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    tool(bin_, "srun", SRUN)
    tool(bin_, "scontrol", SCONTROL)
    return ENVIRONMENT | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "FP8LM_PYTHON": tool(bin_, "python-stub", "#!/usr/bin/env bash\n"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def sbatch(slurm, **variables):
    return subprocess.run(
        ["scripts/slurm.sbatch", "x.yaml"],
        cwd=slurm["SLURM_SUBMIT_DIR"],
        env=slurm | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (1, True)])
def test_what_slurm_starts_again(slurm, code, requeued):
    done = sbatch(slurm, CODE=str(code))
    assert ("scontrol: requeue 123" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else code), done.stderr
    assert "scripts/train_multinode.sh x.yaml" in done.stdout
    assert "at node1:20123, logs in runs/slurm-123/start-0\n" in done.stdout


def test_what_cannot_be_requeued_is_not_called_so(slurm):
    done = sbatch(slurm, CODE="75", FAILS="requeue")
    assert done.returncode == 75 and "requeued" not in done.stdout
    assert done.stderr.startswith("error: ") and "75" in done.stderr


def test_machines_without_names(slurm):
    done = sbatch(slurm, CODE="0", FAILS="show")
    assert done.returncode == 2 and "srun" not in done.stdout
    assert done.stderr.startswith("error: scontrol show hostnames 'node[1-2]'")
    assert done.stderr.count("\n") == 1


def test_a_job_is_for_slurm(slurm):
    done = sbatch(slurm, SLURM_JOB_ID="", SLURM_SUBMIT_DIR=slurm["SLURM_SUBMIT_DIR"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "sbatch scripts/slurm.sbatch" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_job_is_submitted_in_a_checkout(slurm, tmp_path):
    """SLURM runs a copy, which has nothing beside it."""
    copy = shutil.copy(ROOT / "scripts/slurm.sbatch", tool(tmp_path, "slurm_script", ""))
    elsewhere = slurm | {"SLURM_SUBMIT_DIR": "/usr"}
    done = subprocess.run([copy, "x.yaml"], env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /usr ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "processes"),
    [([], "16 processes on 2 nodes"), (["--nnodes", "4"], "32 processes on 4 nodes")],
)
def test_a_job_can_be_looked_at_before(argv, processes, tmp_path):
    """Machines and GPUs as its own #SBATCH lines say; from any folder."""
    link = tmp_path / "job"
    link.symlink_to(ROOT / "scripts/slurm.sbatch")
    config = [str(ROOT / "configs/gpt_tiny.yaml"), "train.global_batch_size=32"]
    done = subprocess.run(
        [link, "--dry-run", *argv, *config, "train.micro_batch_size=1"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(processes)
    assert any(line.startswith("command on node 0 of ") for line in lines)
    (command,) = [shlex.split(line) for line in lines if "fp8lm.launch.agent" in line]
    rendezvous = {"--rdzv-endpoint=NODE0:20000", "--rdzv-id=JOB-0", "--rdzv-conf=is_host=1"}
    logs = {"--log-dir=runs/slurm-JOB/start-0/node_0", "--redirects=3", "--tee=3"}
    assert rendezvous | logs <= set(command)
    assert list(tmp_path.iterdir()) == [link]
    start = ["srun", "--ntasks-per-node=1", "--wait=300", "scripts/train_multinode.sh"]
    assert lines[-1].split() == [*start, *argv, *config, "train.micro_batch_size=1"]


def test_logs_may_lie_elsewhere(slurm, tmp_path):
    done = sbatch(slurm, CODE="1", LOG_DIR=str(tmp_path / "logs"))
    assert done.returncode == 0 and "requeue 123" in done.stdout, done.stderr


def test_failures_in_a_row_end_the_job(slurm):
    """What was saved in between does not count as one."""
    assert [requeues(slurm, code) for code in (1, 137, 75, 1, 1)] == [True] * 5
    last = sbatch(slurm, CODE="1", MAX_FAILURES="3")
    assert last.returncode == 1 and "requeue 123" not in last.stdout
    assert "3 failures in a row" in last.stderr


def requeues(slurm, code):
    return "requeue 123" in sbatch(slurm, CODE=str(code), MAX_FAILURES="3").stdout


def test_the_warning_is_passed_on_and_the_job_requeued(slurm, launch):
    job = launch(
        [f"{slurm['SLURM_SUBMIT_DIR']}/scripts/slurm.sbatch", "x.yaml"], **slurm, WAIT="1", CODE="0"
    )
    job.wait_for("waiting")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert "saved" in job.output and "requeued after exit code 75" in job.output


def test_a_job_that_slurm_ends_is_saved_and_left_to_slurm(slurm, launch):
    job = launch(
        [f"{slurm['SLURM_SUBMIT_DIR']}/scripts/slurm.sbatch", "x.yaml"], **slurm, WAIT="1", CODE="0"
    )
    job.wait_for("waiting")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75
    assert "saved" in job.output and "requeue" not in job.output
