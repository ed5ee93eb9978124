"""What is found before a process is started: one line, exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from fp8lm.config import load_config
from fp8lm.launch import preflight
from fp8lm.launch.main import main, progress_line
from fp8lm.launch.preflight import (
    check_devices,
    check_rendezvous,
    check_run,
    default_processes,
    folder_problems,
    local_address,
    notes,
)
from fp8lm.planner.layout import plan_layout
from fp8lm.runtime.errors import InputError, run_command
from fp8lm.runtime.run_lock import RunFolder, RunLocks
from tests.launch.conftest import ENVIRONMENT, ROOT

CONFIG = str(ROOT / "configs/gpt_tiny.yaml")
SMALL = str(ROOT / "configs/gpt_125m.yaml")
TP2 = ["parallel.tensor_model_parallel_size=2"]


@pytest.fixture
def data(tmp_path):
    """Three documents of tokens below 200."""
    prefix = str(tmp_path / "data_text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for _ in range(3):
        builder.add_document(torch.arange(200), [200])
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nproc-per-node=3", *TP2], "3 processes cannot be divided by tensor_model_parallel"),
        (["--nproc-per-node=3"], "train.global_batch_size = 16 is not divisible by"),
        (["--nproc-per-node=8"], "use a multiple of 32, train.micro_batch_size=2, or another"),
        (
            ["--nproc-per-node=4", "train.micro_batch_size=1", "parallel.node_size=3"],
            "parallel.node_size = 3 does not divide 4 data-parallel ranks",
        ),
        (["model.num_layers=x"], 'model.num_layers = "x": expected'),
        (["data.data_path=[nowhere]"], "data.data_path: nowhere.idx does not exist"),
        (
            ["tokenizer.tokenizer_type=SentencePieceTokenizer", "tokenizer.tokenizer_model=no"],
            "tokenizer_model no does not exist",
        ),
    ],
)
def test_mistakes(argv, message, capsys):
    assert run_command(main, ["--dry-run", CONFIG, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_data_and_its_tokenizer(data, tmp_path, capsys):
    files = [f"data.data_path=[{data}]", "data.split=1,0,0", "train.train_iters=2"]
    before = sorted(tmp_path.iterdir())
    assert run_command(main, ["--dry-run", CONFIG, *files]) == 0
    assert run_command(main, ["--dry-run", CONFIG, *files, "data.split=99,1"]) == 2
    assert "leaves no documents of" in capsys.readouterr().err
    assert run_command(main, ["--dry-run", CONFIG, *files, "tokenizer.vocab_size=99"]) == 2
    assert "holds token id 100 in document 0" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


KEYS = ["checkpoint.save", "logging.dir", "--log-dir"]


@pytest.mark.parametrize("key", KEYS)
def test_folders_are_not_made_by_a_dry_run(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, ["--dry-run", CONFIG, f"{key}=a/b"]) == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").write_text("")
    assert run_command(main, [CONFIG, f"{key}=a/b"]) == 2
    assert f"{tmp_path}/a is no folder" in capsys.readouterr().err
    # A dry run may be that of a cluster.
    assert run_command(main, ["--dry-run", CONFIG, f"{key}=a/b"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "on this machine" in line]
    assert told.startswith("note: ") and told.endswith(f": {tmp_path}/a is no folder")


@pytest.mark.parametrize("key", KEYS)
def test_folders_that_are_not_ours(key, tmp_path, monkeypatch):
    """As for a user who is not root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, *_, **__: False)
    log_dir, keys = (str(tmp_path), []) if key == "--log-dir" else (None, [f"{key}={tmp_path}/a"])
    config = load_config(CONFIG, keys)
    (problem,) = folder_problems(config, log_dir, True)
    assert str(tmp_path) in problem and f": no permission to write in {tmp_path}" in problem
    if key == "logging.dir":  # written on the main machine only
        assert folder_problems(config, log_dir, False) == []


def test_checkpoints_of_another_run(tmp_path):
    (tmp_path / "iter_0000010").mkdir()
    keys = [f"checkpoint.save={tmp_path}", f"checkpoint.load={tmp_path}"]
    (problem,) = folder_problems(load_config(CONFIG, keys[:1]), None, True)
    assert f"{tmp_path} holds checkpoints up to iteration 10" in problem
    assert folder_problems(load_config(CONFIG, keys), None, True) == []


@pytest.mark.parametrize("key", KEYS[:2])
def test_folders_of_a_run_that_lives(key, tmp_path, capsys):
    folder = RunFolder(str(tmp_path), key, key)
    locks = RunLocks()
    locks.take([folder])
    try:
        assert run_command(main, [CONFIG, f"{key}={tmp_path}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{key}={tmp_path}" in line and f"process {os.getpid()} " in line
        assert run_command(main, ["--dry-run", CONFIG, f"{key}={tmp_path}"]) == 0
        (told,) = [s for s in capsys.readouterr().out.splitlines() if "on this machine" in s]
        assert f"process {os.getpid()} " in told
        reading = [f"checkpoint.load={tmp_path}", "--dry-run"]
        assert run_command(main, [CONFIG, *reading]) == 0
        assert f"process {os.getpid()} " not in capsys.readouterr().out
    finally:
        locks.release()


def layout(*overrides, world=2, node_size=2):
    return plan_layout(load_config(CONFIG, list(overrides)), 256, world, node_size)


def test_notes():
    assert notes(layout(*TP2), 0) == []
    assert "a restart begins anew" in notes(layout(*TP2), 3)[0]
    assert "tensor-parallel groups of 2 span nodes of 3" in notes(layout(*TP2, node_size=3), 0)[0]
    assert notes(layout("checkpoint.save=a", "checkpoint.load=a"), 3) == []


def test_whole_tensors_that_do_not_go_round():
    (note,) = notes(layout(world=16, node_size=16), 0)
    assert note.endswith("do not go round 16 replicas, parallel.partition=even does")
    assert notes(layout("parallel.partition=even", world=16, node_size=16), 0) == []
    plain = layout("parallel.use_distributed_optimizer=false", world=16, node_size=16)
    assert notes(plain, 0) == []


@pytest.mark.parametrize(
    ("preset", "replicas", "warned"),
    [("o3", 1, True), ("o3", 4, False), ("o3_long", 1, False), ("bf16", 1, False)],
)
def test_many_micro_batches_in_e4m3(preset, replicas, warned):
    """32 on one replica, 8 on each of four."""
    batch = ("train.micro_batch_size=1", "train.global_batch_size=32")
    found = notes(layout(f"precision.preset={preset}", *batch, world=replicas), 0)
    assert [("32 micro-batches" in n, "fp8_e2m5" in n) for n in found] == [(True, True)] * warned


PP = ["parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=1"]
STAGES = [*PP, "train.global_batch_size=12"]


@pytest.mark.parametrize(
    ("nodes", "per_node", "how"), [(3, 2, "one by one"), (3, 8, "in groups of 4"), (2, 2, None)]
)
def test_stages_that_begin_in_the_middle_of_machines(nodes, per_node, how):
    keys = STAGES if how else [*PP, "train.global_batch_size=4"]
    layout = check_run(load_config(CONFIG, keys), nodes, per_node).layout
    found = [note for note in notes(layout, 0) if "between machines" in note]
    assert [note.rpartition(" between machines ")[2] for note in found] == ([how] if how else [])


def test_a_size_of_nodes_that_was_asked_for_has_to_fit():
    config = load_config(CONFIG, [*STAGES, "parallel.node_size=2"])
    with pytest.raises(InputError, match="node_size = 2 does not divide 3 data-parallel ranks"):
        check_run(config, 3, 2)


def test_row_blocks_that_are_uneven():
    even, overlap = "parallel.partition=even", "parallel.overlap_param_gather=true"

    def notes_of(*keys):
        config = load_config(SMALL, ["data.mock_data=true", even, *keys])
        return notes(plan_layout(config, 50304, 8, 8), 0)

    (note,) = notes_of()
    assert "owns 1.3 times the mean" in note
    assert overlap in note
    assert notes_of(overlap) == []
    small = layout(even, overlap, "parallel.ddp_bucket_size=4000", world=64, node_size=64)
    (note,) = notes(small, 0)
    assert note.endswith("a larger parallel.ddp_bucket_size to more")


def test_where_machines_meet():
    for endpoint in ("localhost:29400", "127.0.0.1:1", "[::1]:1"):
        check_rendezvous(endpoint, is_host=False)
    with pytest.raises(InputError, match=r"nohost.invalid:1: no machine of that name"):
        check_rendezvous("nohost.invalid:1", is_host=False, patience=0.0)


def test_the_port_of_the_meeting_is_free_on_its_host():
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
        check_rendezvous(endpoint, is_host=False)
        with pytest.raises(InputError, match=f"{endpoint}: port .* in use: choose another one"):
            check_rendezvous(endpoint, is_host=True)


@pytest.mark.parametrize(
    ("name", "endpoint", "expected"),
    [("10.1.2.3", "10.0.0.9:1", None), ("localhost", "localhost:1", "10.0.0.5")],
)
def test_where_others_reach_this_machine(name, endpoint, expected, monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda: name)
    monkeypatch.setattr(preflight, "outward_address", lambda: "10.0.0.5")
    assert local_address(endpoint) == expected


def test_a_machine_without_a_clear_address(monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost")
    monkeypatch.setattr(preflight, "outward_address", lambda: None)
    with pytest.raises(InputError, match="localhost, leads only to itself"):
        local_address("localhost:1")


@pytest.mark.parametrize("host", ["node0..cluster", "n" * 64])
def test_what_cannot_be_a_name_is_not_waited_for(host, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(InputError, match=f"--rdzv-endpoint={host}:1: {host} is no name of a"):
        check_rendezvous(f"{host}:1", is_host=False)
    assert capsys.readouterr().out == ""


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs: of compute capability `of[number]`, and with NCCL."""
    of = [(9, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    return of


def test_devices(two_gpus):
    config = load_config(CONFIG)
    assert default_processes(config) == 2
    check_devices(config, 2)
    with pytest.raises(InputError, match="--nproc-per-node=3, but this machine has 2 GPUs"):
        check_devices(config, 3)
    on_cpu = load_config(CONFIG, ["train.device=cpu"])
    assert default_processes(on_cpu) == 1
    check_devices(on_cpu, 3)


@pytest.mark.parametrize("given", [[], ["train.device=auto"], ["train.device=cpu"]])
def test_a_simulation_leaves_gpus_alone(given, two_gpus, monkeypatch, capsys):
    """Simulated machines would share them."""
    started = []
    monkeypatch.setattr(
        "fp8lm.launch.simulate.run_simulated", lambda *arguments: started.append(arguments) or 0
    )
    assert run_command(main, ["--simulate=2", CONFIG, *given]) == 0, capsys.readouterr().err
    ((options, processes, _),) = started
    assert options.overrides[-1] == "train.device=cpu" and processes == 1
    assert run_command(main, ["--dry-run", "--simulate=2", CONFIG, *given]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.endswith(" ".join(["--simulate=2", CONFIG, *given])) for line in shown)


def test_a_gpu_without_fp8(two_gpus):
    two_gpus[1] = (8, 0)
    check_devices(load_config(CONFIG), 1)
    with pytest.raises(InputError, match=r"GPU 1 has compute capability 8\.0; FP8"):
        check_devices(load_config(CONFIG), 2)


def test_gpus_without_nccl(two_gpus, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="this PyTorch has no NCCL"):
        check_devices(load_config(CONFIG), 1)
    check_devices(load_config(CONFIG, ["train.device=cpu"]), 1)


LIGHT = f"""
import sys
from fp8lm.config import load_config
from fp8lm.launch.preflight import check_run
data = ["data.mock_data=false", "data.data_path=[data_text_document]", "data.split=1,0,0"]
check_run(load_config({CONFIG!r}, data), 1, 2)
print(*(heavy for heavy in ("megatron", "torch._dynamo", "wandb") if heavy in sys.modules))
"""


@pytest.mark.slow
def test_the_checks_import_nothing_that_takes_seconds(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.0), (True, 9.0), (False, 0.0)])
def test_a_slow_check_is_told_to_a_terminal(terminal, seconds, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_line("at work", after=seconds):
        time.sleep(0.1)
    assert capsys.readouterr().err == ("at work\n" if terminal and not seconds else "")
