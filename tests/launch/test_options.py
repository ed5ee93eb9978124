"""The launcher's command line, and the torchrun command it turns into."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

import fp8lm.launch.command
from fp8lm.launch.command import (
    ALLOCATOR,
    OLD_ALLOCATOR,
    TIMEOUT,
    command_line,
    torchrun_arguments,
    torchrun_environment,
)
from fp8lm.launch.main import main
from fp8lm.launch.options import parse_options
from fp8lm.runtime.errors import InputError
from tests.launch.conftest import ENVIRONMENT, ROOT

CONFIG = "configs/gpt_tiny.yaml"
TWO = ["--nnodes=2", "--rdzv-endpoint=host:1", CONFIG]


def torchrun(*argv, nproc=1):
    """What torchrun understands of the arguments that these options become."""
    return parse_args(torchrun_arguments(parse_options([*map(str, argv)]), nproc))


def test_config_comes_first_or_by_name():
    for argv in ([CONFIG, "a.b=1"], ["a.b=1", "--config", CONFIG], ["--config", CONFIG, "a.b=1"]):
        options = parse_options(argv)
        assert (options.config, options.overrides) == (CONFIG, ("a.b=1",))


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("host", "host:29400"),
        ("host.domain:65535", "host.domain:65535"),
        ("[::1]", "[::1]:29400"),
        ("[fe80::1]:1", "[fe80::1]:1"),
    ],
)
def test_where_nodes_meet(endpoint, expected):
    assert torchrun("--nnodes=2", f"--rdzv-endpoint={endpoint}", CONFIG).rdzv_endpoint == expected


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "--simulate N" in capsys.readouterr().out


def test_one_machine():
    args = torchrun(CONFIG, "a.b=[1, 2]", nproc=8)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("1", "8", 0)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "localhost:0")
    assert args.signals_to_handle.split(",") == [
        "SIGTERM",
        "SIGINT",
        "SIGHUP",
        "SIGQUIT",
        "SIGUSR1",
    ]
    assert Path(args.training_script).name == "pretrain_gpt.py"
    assert args.training_script_args == ["--config", CONFIG, "a.b=[1, 2]"]


def test_several_machines():
    args = torchrun("--node-rank=1", "--rdzv-id=job", "--local-addr=me", *TWO)
    assert (args.nnodes, args.rdzv_endpoint, args.rdzv_id) == ("2", "host:1", "job")
    assert (args.rdzv_conf, args.local_addr, args.max_restarts) == ("is_host=0", "me", 3)
    assert torchrun("--node-rank=0", *TWO).rdzv_conf == "is_host=1"
    assert torchrun(*TWO).rdzv_conf == ""  # torchrun compares names


def test_number_of_nodes_as_kubeflow_writes_it():
    assert parse_options(["--nnodes=2:2", "--rdzv-endpoint=host", CONFIG]).nnodes == 2


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ([CONFIG], "logs"),
        (["--node-rank=1", *TWO], "logs/node_1"),
        (TWO, f"logs/{platform.node()}"),
    ],
)
def test_logs_of_nodes_are_apart(argv, folder):
    args = torchrun("--log-dir=logs", *argv)
    assert (args.log_dir, args.redirects, args.tee) == (folder, "3", "3")
    assert args.local_ranks_filter == "0"


def test_variables(monkeypatch):
    ours = ("OMP_NUM_THREADS", TIMEOUT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    for name in (*ours, ALLOCATOR, OLD_ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    here = torchrun_environment(parse_options([CONFIG, "--shutdown-timeout=9"]))
    assert here == {"OMP_NUM_THREADS": "1", TIMEOUT: "9", ALLOCATOR: "expandable_segments:True"}
    assert torchrun_environment(parse_options(TWO))["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert torchrun_environment(parse_options([CONFIG]))[TIMEOUT] == "240"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv(TIMEOUT, "30")  # an option wins
    assert torchrun_environment(parse_options([CONFIG]))[TIMEOUT] == "30"
    timeout = parse_options([CONFIG, "--shutdown-timeout=600"])
    assert torchrun_environment(timeout)[TIMEOUT] == "600"
    assert torchrun_environment(parse_options([CONFIG]))["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:64")
    assert torchrun_environment(parse_options([CONFIG]))[ALLOCATOR] == "max_split_size_mb:64"
    monkeypatch.delenv(ALLOCATOR)
    monkeypatch.setenv(OLD_ALLOCATOR, "max_split_size_mb:64")  # under its old name
    assert ALLOCATOR not in torchrun_environment(parse_options([CONFIG]))


def test_without_a_checkout_the_module_is_started(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages/fp8lm/launch/command.py"
    monkeypatch.setattr(fp8lm.launch.command, "__file__", str(installed))
    args = torchrun(CONFIG, "a.b=1")
    assert args.module and args.training_script == "fp8lm.pretrain"
    assert args.training_script_args == ["--config", CONFIG, "a.b=1"]


def test_one_machine_in_a_pod_of_several(monkeypatch):
    """torchrun takes PET_... for options that are not given."""
    monkeypatch.setenv("PET_NNODES", "4")
    assert torchrun(CONFIG).nnodes == "1"


def test_command_is_what_a_shell_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    line = command_line({"A": "b c"}, "a.module", ["data.data_path=[a b, c]"])
    words = ["A=b c", sys.executable, "-m", "a.module"]
    assert shlex.split(line) == [*words, "data.data_path=[a b, c]"]


@pytest.mark.parametrize(
    ("folder", "path", "needed"),
    [(ROOT, ROOT, False), (ROOT.parent, "/elsewhere", False), (ROOT.parent, f"/a:{ROOT}", True)],
)
def test_a_command_names_the_path_of_the_package_where_it_needs_it(
    folder, path, needed, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(path))
    words = [f"PYTHONPATH={ROOT}"] * needed + [sys.executable, "-m", "m"]
    assert shlex.split(command_line({}, "m", [])) == words


@pytest.mark.parametrize(
    ("argv", "where", "logs"),
    [
        ([], "on each of 2 nodes", 'a b/"$(uname -n)"'),
        (["--node-rank=1"], "on node 1 of 2", "a b/node_1"),
        (["--local-addr=me"], "on the node at me, one of 2", 'a b/"$(uname -n)"'),
    ],
)
def test_whose_command_it_is(argv, where, logs, capsys):
    """A command for all nodes names none of them."""
    assert main(["--dry-run", "--nproc-per-node=1", "--log-dir=a b", *argv, *TWO]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = lines[lines.index(f"command {where}:") + 1]
    shell = ["sh", "-c", f"printf '%s\\n' {line[line.index(' -m ') :]}"]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"--log-dir={logs}".replace('"$(uname -n)"', platform.node()) in words
    assert ("$(uname -n)" in line) == ("$(uname -n)" in logs)


def test_command_of_a_simulation(capsys):
    """Only the launcher can start it."""
    assert main(["--dry-run", "--simulate", "2", CONFIG, "train.device=cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " -m " in line)
    assert line.endswith(f"{sys.executable} -m fp8lm.launch --simulate 2 {CONFIG} train.device=cpu")


@pytest.mark.slow
def test_the_printed_command_starts_the_run(launch, tmp_path):
    """In another folder than the checkout; a signal then ends what has nothing to save."""
    config = str(ROOT / CONFIG)
    endless = ["train.train_iters=9999", "scheduler.lr_decay_iters=9999", "train.device=cpu"]
    command = [sys.executable, "-m", "fp8lm.launch", "--dry-run", "--nproc-per-node=2", config]
    printed = subprocess.run(
        [*command, *endless], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    line = printed.stdout.splitlines()[-1]
    job = launch(["bash", "-c", f"cd {tmp_path} && exec env -u PYTHONPATH {line}"])
    job.wait_for(r"iteration +\d+/")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 138, job.output
    assert "received SIGUSR1: stopped after iteration" in job.output
    assert "; nothing is saved without checkpoint.save" in job.output


@pytest.mark.slow
def test_who_reads_a_dry_run_may_leave():
    """As in `--dry-run | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fp8lm.launch", "--dry-run", CONFIG],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_one_number():
    with pytest.raises(InputError):
        parse_options(["--max-restarts=-1", CONFIG])
