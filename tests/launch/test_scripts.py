"""The launchers as scripts: linted; how variables of clusters become options."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp8lm.config import load_config
from fp8lm.launch.options import GRACE, parse_options
from fp8lm.launch.preflight import check_run
from tests.launch.conftest import ENVIRONMENT, ROOT, tool

NAMES = ("_env.sh", "train.sh", "train_multinode.sh", "slurm.sbatch", "quickstart.sh")
SCRIPTS = [ROOT / "scripts" / name for name in NAMES]
ECHO = '#!/usr/bin/env bash\n[[ $1 == - ]] && exit 0\nshift 2\nprintf "%s\\n" "$@"\n'


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    command = beside if beside.exists() else shutil.which("shellcheck")
    assert command, "shellcheck comes with the extra dev"
    done = subprocess.run(
        [command, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


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


@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh"])
def test_a_link_elsewhere_leads_to_the_script(script, tmp_path):
    link = tmp_path / "go"
    link.symlink_to(ROOT / "scripts" / script)
    echo = tool(tmp_path, "echo-python", ECHO)
    variables = {"PATH": os.environ["PATH"], "FP8LM_PYTHON": echo}
    done = subprocess.run([link, "a.yaml"], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a.yaml\n"), done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["train.sh", "a.yaml"],
        ["train_multinode.sh", "a.yaml"],
        ["slurm.sbatch", "--dry-run", "a.yaml"],
        ["quickstart.sh", "--help"],
        ["test.sh", "lint"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_relative_interpreter_starts_where_the_script_is_called(argv, tmp_path):
    (tmp_path / "bin").mkdir()
    tool(tmp_path / "bin", "echo-python", ECHO)
    variables = {"PATH": os.environ["PATH"], "FP8LM_PYTHON": "bin/echo-python"}
    command = [ROOT / "scripts" / argv[0], *argv[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize("key", ["precision.preset", "logging.dir", "checkpoint.save"])
def test_the_quickstart_keeps_its_two_runs_apart(key, tmp_path):
    """Told before what a former call left is replaced."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    before = tmp_path / "runs/quickstart/summary.json"
    before.parent.mkdir(parents=True)
    before.write_text("{}")
    stub = tool(tmp_path, "python-stub", "#!/usr/bin/env bash\n")
    done = subprocess.run(
        [tmp_path / "scripts/quickstart.sh", "train.train_iters=5", f"{key}=o2"],
        env={"PATH": os.environ["PATH"], "FP8LM_PYTHON": stub},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {key} is set by quickstart.sh itself: drop {key}=o2")
    assert before.exists()


def test_an_empty_config(tmp_path):
    """A variable of a shell that is not set."""
    done = subprocess.run(
        ["scripts/train.sh", ""], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no config: ") and done.stderr.count("\n") == 1


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
            {"NNODES": "2", "MASTER_ADDR": "fe80::1"},
            ["--nnodes=2", "--rdzv-endpoint=[fe80::1]:29400"],
        ),
        (
            {"PET_NNODES": "2:2", "PET_RDZV_ENDPOINT": "w-0:1", "PET_MAX_RESTARTS": "10"}
            | {"PET_NPROC_PER_NODE": "auto"},
            ["--nnodes=2:2", "--rdzv-endpoint=w-0:1", "--max-restarts=10"],
        ),
    ],
)
def test_variables_become_options(arguments, variables, expected):
    assert arguments("train_multinode.sh", "x.yaml", **variables) == [*expected, "x.yaml"]


def test_a_simulation_ignores_the_cluster(arguments):
    argv = ["--simulate", "2", "x.yaml"]
    cluster = {"SLURM_NNODES": "4", "MASTER_ADDR": "a", "LOCAL_ADDR": "b", "PET_MAX_RESTARTS": "9"}
    cluster |= {"SLURM_GPUS_ON_NODE": "8", "PET_NPROC_PER_NODE": "8"}
    assert arguments("train_multinode.sh", *argv, **cluster) == argv
    given = arguments("train_multinode.sh", *argv, **cluster, NPROC_PER_NODE="2")
    assert given == ["--nproc-per-node=2", *argv]


@pytest.mark.parametrize("argv", [["--nproc-per-node=2"], ["--nproc-per-node", "2"]])
def test_of_a_variable_whose_option_is_given_nothing_is_read(arguments, argv):
    nonsense = {"PET_NPROC_PER_NODE": "many", "NNODES": "x", "MASTER_ADDR": "a"}
    expected = ["--rdzv-endpoint=a:29400", *argv, "--nnodes=1", "x.yaml"]
    assert arguments("train_multinode.sh", *argv, "--nnodes=1", "x.yaml", **nonsense) == expected


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
    rendezvous = [f"--nnodes={replicas}:{replicas}", "--rdzv-endpoint=fp8lm-worker-0:23456"]
    options = parse_options([*rendezvous, *container["args"]])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == options.nproc_per_node
    assert pod["terminationGracePeriodSeconds"] > (options.shutdown_timeout or GRACE)
    user = f"USER {pod['securityContext']['fsGroup']}"
    assert user in (ROOT / "Dockerfile").read_text().splitlines()
    config = load_config(ROOT / options.config, options.overrides)
    check_run(config, options.nnodes, options.nproc_per_node)
    assert config.checkpoint.save == config.checkpoint.load
