"""The launcher's command line, and the torchrun command it turns into."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from fp8lm.errors import InputError, run_command
from fp8lm.launch.command import command_line, torchrun_arguments, torchrun_environment
from fp8lm.launch.main import main
from fp8lm.launch.options import parse_options

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
    ("argv", "message"),
    [
        ([], "no config: python -m fp8lm.launch"),
        (["a.b=1"], "no config"),
        ([CONFIG, "--train.seed=3"], "unknown option --train.seed=3: write train.seed=3"),
        ([CONFIG, "--nodes", "3"], "unknown option --nodes"),
        ([CONFIG, "--nnodes", "0"], "'0' is not a number of at least 1"),
        ([CONFIG, "--nnodes", "2:4"], "'2:4' is a range: give one number"),
        ([CONFIG, "--nnodes", "2"], "--nnodes=2 needs --rdzv-endpoint=HOST:PORT"),
        ([*TWO, "--node-rank", "2"], "--node-rank=2 is not below --nnodes=2"),
        (["--nnodes=2", "--rdzv-endpoint=host:x", CONFIG], "write it as HOST:PORT"),
        (["--simulate=2", "--node-rank=0", CONFIG], "--simulate makes its own nodes"),
        (["--simulate=2", "--nnodes=3", CONFIG], "drop --nnodes, --node-rank and --rdzv-endpoint"),
        ([CONFIG, "--log-dir", "/proc/no"], "--log-dir=/proc/no cannot be made: No such file"),
        ([CONFIG, "--log-dir", __file__], f"--log-dir={__file__} cannot be made: File exists"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert run_command(main, argv) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "--simulate N" in capsys.readouterr().out


def test_one_machine():
    args = torchrun(CONFIG, "a.b=[1, 2]", nproc=8)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("1:1", "8", 0)
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
    assert torchrun("--nnodes=2", "--rdzv-endpoint=host", CONFIG).rdzv_endpoint == "host:29400"


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
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    here = torchrun_environment(parse_options([CONFIG, "--shutdown-timeout=9"]))
    assert here == {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}
    assert torchrun_environment(parse_options(TWO))["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert torchrun_environment(parse_options([CONFIG]))["OMP_NUM_THREADS"] == "4"


def test_command_is_what_a_shell_takes():
    arguments = torchrun_arguments(parse_options([CONFIG, "data.data_path=[a b, c]"]), 1)
    line = command_line({"A": "b c"}, arguments)
    assert shlex.split(line) == ["A=b c", "torchrun", *arguments]


def test_only_one_number():
    with pytest.raises(InputError):
        parse_options(["--max-restarts=-1", CONFIG])
