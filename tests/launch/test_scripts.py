"""The launchers as scripts: linted, and run against a SLURM that is only pretended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp8lm.config import load_config
from fp8lm.launch.options import parse_options
from fp8lm.launch.preflight import check_run
from tests.launch.conftest import ENVIRONMENT, ROOT

SCRIPTS = [ROOT / "scripts" / name for name in ("train.sh", "train_multinode.sh", "slurm.sbatch")]
ECHO = '#!/usr/bin/env bash\n[[ $1 == - ]] && exit 0\nshift 2\nprintf "%s\\n" "$@"\n'


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    command = beside if beside.exists() else shutil.which("shellcheck")
    assert command, "shellcheck comes with the extra dev"
    done = subprocess.run(
        [command, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def tool(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def arguments(tmp_path):
    """`arguments(script, *argv, VARIABLE=...)`: what the script gives `python -m fp8lm.launch`."""
    echo = tool(tmp_path, "echo-python", ECHO)

    def run(script, *argv, **variables):
        variables = {"PATH": os.environ["PATH"], "FP8LM_PYTHON": echo, **variables}
        done = subprocess.run(
            [f"scripts/{script}", *argv], cwd=ROOT, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_train(arguments):
    assert arguments("train.sh", "a.yaml", "b.c=d e") == ["a.yaml", "b.c=d e"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, []),
        (
            {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "a", "JOB_ID": "j", "LOG_DIR": "l"},
            [
                "--nnodes=4",
                "--node-rank=1",
                "--rdzv-endpoint=a:29400",
                "--rdzv-id=j",
                "--log-dir=l",
            ],
        ),
        (
            {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "MASTER_ADDR": "a"}
            | {"MASTER_PORT": "5", "SLURM_RESTART_COUNT": "3", "SLURM_GPUS_ON_NODE": "8"},
            [
                "--nnodes=2",
                "--node-rank=0",
                "--rdzv-endpoint=a:5",
                "--rdzv-id=7-3",
                "--nproc-per-node=8",
            ],
        ),
        (
            {"PET_NNODES": "2:2", "PET_RDZV_ENDPOINT": "w-0:1", "PET_MAX_RESTARTS": "10"},
            ["--nnodes=2:2", "--rdzv-endpoint=w-0:1", "--max-restarts=10"],
        ),
    ],
)
def test_variables_become_options(arguments, variables, expected):
    assert arguments("train_multinode.sh", "x.yaml", **variables) == [*expected, "x.yaml"]


def test_a_simulation_ignores_the_cluster(arguments):
    argv = ["--simulate", "2", "x.yaml"]
    assert arguments("train_multinode.sh", *argv, SLURM_NNODES="4", MASTER_ADDR="a") == argv


# A training that ends with the code in $CODE; with $WAIT it waits for SLURM's warning and saves.
SRUN = """#!/usr/bin/env bash
echo "srun: $*"
if [[ -n ${WAIT:-} ]]; then
  trap 'echo saved; exit 75' USR1
  trap 'echo killed; exit 137' TERM
  echo waiting
  for _ in {1..100}; do sleep 0.1; done
fi
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
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
        timeout=60,
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (1, True)])
def test_what_slurm_starts_again(slurm, code, requeued):
    done = sbatch(slurm, CODE=str(code))
    assert ("scontrol: requeue 123" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else code), done.stderr
    assert "scripts/train_multinode.sh x.yaml" in done.stdout


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


def test_kubernetes_job():
    """Its numbers agree, and its command is one that would start."""
    job = yaml.safe_load((ROOT / "scripts/kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    replicas = worker["replicas"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == replicas
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["scripts/train_multinode.sh"] and container["name"] == "pytorch"
    meeting = [f"--nnodes={replicas}:{replicas}", "--rdzv-endpoint=fp8lm-worker-0:23456"]
    options = parse_options([*meeting, *container["args"]])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == options.nproc_per_node
    assert pod["terminationGracePeriodSeconds"] > options.shutdown_timeout
    user = f"USER {pod['securityContext']['fsGroup']}"
    assert user in (ROOT / "Dockerfile").read_text().splitlines()
    config = load_config(ROOT / options.config, options.overrides)
    check_run(config, options.nnodes, options.nproc_per_node)
    assert config.checkpoint.save == config.checkpoint.load
