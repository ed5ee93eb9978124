"""The words: numbers with units, ranges, tables; the dry run in the documentation, by the line."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from fp8lm.launch.main import main
from fp8lm.planner.describe import aligned, count, ranges, short, size
from fp8lm.runtime.errors import InputError
from tests.launch.conftest import ROOT


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1024, "1.02 k"),
        (1048576, "1.05 M"),
        (40e9, "40.0 B"),
        (175e9, "175 B"),
    ],
)
def test_numbers(number, text):
    assert short(number) == text


def test_bytes():
    assert [size(n) for n in (5, 2048, 18.3e9)] == ["5 B", "2.05 kB", "18.3 GB"]


def test_counts():
    assert count(1, "process") == "1 process" and count(2, "process") == "2 processes"
    assert count(2, "micro-batch") == "2 micro-batches" and count(3, "step") == "3 steps"


def test_ranges():
    assert ranges([0, 1, 2, 3, 8, 10, 11]) == "0-3, 8, 10-11"
    assert ranges([0, 0, 0, 1, 1]) == "0-1"


def test_columns():
    assert aligned([("a", "bb"), ("ccc", "d")], left={1}) == ["  a  bb", "ccc  d"]


# By hand. A stage of 24 layers on 8 shards has, of H = 12288, 24 * 12 H^2 / 8 = 5,435,817,984
# elements: 5.44 GB of weights in E4M3, 5.61 GB of gradients in E2M5 with four bytes of scale per
# 128, and on each of 4 replicas a quarter of 2 + 1 + 2 bytes of states: 6.79 GB. Together 17.8 GB,
# 17.9 with norms and biases.
# The word table adds to the outer stages, on each shard, 50304 / 8 rows of H in BF16 with fp32
# gradients and states of 5 bytes: 0.155 + 0.309 GB, and 0.386 GB on one of 4 replicas, which has
# fewer layers for it: 18.4 GB.
# 175 B = 96 * 12 H^2 + 50304 H + ... = 174.6 B.
# Idle: (4 - 1) / (128 + 4 - 1) = 2.3 %.
JOB = ["--dry-run", "--nnodes", "16", "--nproc-per-node", "8", str(ROOT / "configs/gpt_175b.yaml")]
SET = (
    *("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)


def shown():
    """The first command of docs/user-guide/launching.md, and the output shown below it."""
    page = (ROOT / "docs/user-guide/launching.md").read_text()
    pattern = r"```bash\n(.* --dry-run .*)\n```\n\n```\n([^`]*)```"
    command, output = re.search(pattern, page).groups()
    return shlex.split(command)[1:], output.splitlines()


def test_the_dry_run_on_the_page(monkeypatch, capsys):
    argv, lines = shown()
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    assert main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(printed) if " -m fp8lm.launch.agent " in line]
    # The page leaves out where Python is, and the end.
    before, after = lines[at].removesuffix(" ...").split("/path/.venv/bin/python ")
    assert printed[at].startswith(f"{before}{sys.executable} {after} ")
    assert printed[at].endswith("pretrain_gpt.py --config configs/gpt_175b.yaml")
    assert "--nnodes=16 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT" in printed[at]
    assert [*printed[:at], *printed[at + 1 :]] == [*lines[:at], *lines[at + 1 :]]


def test_all_ranks(capsys):
    """Rank (stage * 4 + replica) * 8 + shard: 37 is shard 5 of replica 0 of stage 1."""
    assert main([*JOB, "--all-ranks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranks = {line.split()[0]: " ".join(line.split()) for line in lines if line[:5].strip()}
    assert {str(rank) for rank in range(128)} < set(ranks)
    head = "rank node local tensor data stage layers besides weights grads master exp_avg"
    assert ranks["rank"].startswith(head)
    assert ranks["37"].startswith("37 4 5 5 0 1 24-47 5.44 GB 5.61 GB")
    assert ranks["101"].startswith("101 12 5 5 0 3 72-95 final norm, tied head 5.59 GB")


@pytest.mark.slow
def test_predictions(capsys):
    argv = [
        "--dry-run",
        "--gpu",
        "h200",
        "--nproc-per-node",
        "2",
        str(ROOT / "configs/gpt_tiny.yaml"),
    ]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("2 x NVIDIA H200")]
    assert lines[at + 1].split() == ["o3", "bf16"]
    assert any(line.startswith("ms of a step") for line in lines[at:])


@pytest.mark.parametrize(
    ("options", "words"), [(["--gpu", "h100"], "--dry-run"), (["--dry-run", "--gpu", "x1"], "x1")]
)
def test_predictions_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words):
        main([*options, "--nproc-per-node", "1", str(ROOT / "configs/gpt_tiny.yaml")])
