"""Losses and state digests of fixed runs: the same bits before and after a change of the code.

python tools/golden_losses.py write --output golden.json
python tools/golden_losses.py check golden.json
python tools/golden_losses.py check --against REV [--only NAME ...]

Every run trains a tiny model through the command line, stops in the middle, and goes on from its
checkpoint. `write` keeps its losses and the SHA-256 of all tensors of its last checkpoint; `check`
runs again and compares. Bits differ between processors and versions of PyTorch, so a file is good
for the machine that wrote it; `--against REV` needs no file: it checks out that commit of this
repository aside and runs both here. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from forked_jobs import JobServer

from fp8lm.arguments import as_path, file_to_write
from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import read_tensor, stored_tensors
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

ROOT = Path(__file__).resolve().parents[1]
REPORTED = (
    "lm loss",
    "lm loss validation",
    "grad-norm",
    "learning-rate",
    "consumed_samples",
    *("token accuracy validation", "rewards/margins", "kl"),
)
FIXED = {
    "model.num_layers": 4,
    "model.seq_length": 32,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 8,
    "train.train_iters": 6,
    "train.eval_interval": 3,
    "train.eval_iters": 1,
    "train.num_threads": 1,
    "optimizer.lr": 1e-2,
    "logging.log_interval": 1,
    "logging.tensorboard": "false",
}
HALF = {"train.exit_interval": 3}
Overrides = dict[str, Any]


@dataclass(frozen=True)
class GoldenRun:
    """How many processes run with which keys."""

    processes: int
    overrides: Overrides


def _parallel(tp: int = 1, pp: int = 1, **keys: Any) -> Overrides:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return {f"parallel.{key}": value for key, value in {**sizes, **keys}.items()}


def _preset(name: str, **keys: Any) -> Overrides:
    return {"precision.preset": name} | {f"precision.{key}": v for key, v in keys.items()}


_SP: Overrides = {"sequence_parallel": "true"}
_FP32 = _preset("bf16", gemm="fp32", params_dtype="fp32") | {"precision.wire.grads": "fp32"}
_LLAMA = {
    "model.swiglu": "true",
    "model.normalization": "RMSNorm",
    "model.disable_bias_linear": "true",
    "model.num_query_groups": 2,
    "model.untie_embeddings_and_output_weights": "true",
}
_DROPOUT = {
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "train.recompute_granularity": "full",
}
# With this seed of the mock data 59 of the first 64 samples have an end of a document.
_DOCUMENTS = {
    "data.reset_position_ids": "true",
    "data.reset_attention_mask": "true",
    "data.eod_mask_loss": "true",
    "data.shuffle_seed": 5747,
    "train.recompute_granularity": "selective",
}
_O3, _SUM = _preset("o3"), _preset("o3", grad_reduce="fp8_sum")
_RECIPES = ("te_delayed", "coat", "unit", "deepseek", "mxfp8")
_ROWS = _preset("o3", **{"scaling.input": "row", "scaling.grad_output": "row"})
_INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}

RUNS = {
    "fp32": GoldenRun(1, _FP32),
    **{name: GoldenRun(1, _preset(name)) for name in ("bf16", "te", "o1", "o2", "o3")},
    "o3_long": GoldenRun(1, _preset("o3_long")),
    "o4": GoldenRun(1, _preset("o4")),
    **{name: GoldenRun(1, _preset(name)) for name in _RECIPES},
    "o3 smooth swiglu tp2": GoldenRun(
        2, _preset("o3", smooth_swiglu="true") | _LLAMA | _parallel(2)
    ),
    "te_delayed tp2 pp2": GoldenRun(4, _preset("te_delayed") | _parallel(2, 2, **_SP)),
    "o3 rows tp2 sp": GoldenRun(2, _ROWS | _parallel(2, **_SP)),
    "o3 llama": GoldenRun(1, _O3 | _LLAMA),
    "o3 dropout recompute": GoldenRun(1, _O3 | _DROPOUT),
    "o3 tp2": GoldenRun(2, _O3 | _parallel(2)),
    "o3 tp2 sp": GoldenRun(2, _O3 | _parallel(2, **_SP) | _LLAMA),
    "o3 pp2 1f1b": GoldenRun(2, _O3 | _parallel(1, 2)),
    "o3 pp2 zb-h1": GoldenRun(2, _O3 | _parallel(1, 2, pipeline_schedule="zb-h1")),
    "o3 pp2 interleaved": GoldenRun(2, _O3 | _parallel(1, 2, **_INTERLEAVED)),
    "bf16 dp2": GoldenRun(2, _preset("bf16")),
    "o3 dp2 tensor": GoldenRun(2, _O3),
    "o3 dp2 even": GoldenRun(2, _O3 | _parallel(partition="even")),
    "o3 dp2 plain": GoldenRun(2, _O3 | _parallel(use_distributed_optimizer="false")),
    "o3 dp2 tensor fp8_sum": GoldenRun(2, _SUM),
    "o3 dp2 even fp8_sum": GoldenRun(2, _SUM | _parallel(partition="even")),
    "o3 dp4 two nodes": GoldenRun(4, _O3 | _parallel(node_size=2)),
    "o3 tp2 pp2 dp2": GoldenRun(8, _O3 | _parallel(2, 2, **_SP) | _DROPOUT),
    "o3 documents tp2 pp2": GoldenRun(4, _O3 | _DOCUMENTS | _parallel(2, 2, **_SP)),
    "o3 sft dp2": GoldenRun(2, _O3 | {"train.objective": "sft"}),
    "o3 dpo tp2 pp2": GoldenRun(4, _O3 | {"train.objective": "dpo"} | _parallel(2, 2, **_SP)),
    "bf16 tp2 pp2 dp2": GoldenRun(
        8, _preset("bf16") | _parallel(2, 2, **_SP, **_INTERLEAVED, partition="even") | _LLAMA
    ),
}


def main(argv: list[str]) -> int:
    """Write or check; the exit code."""
    options = parse(argv)
    names = options.only or list(RUNS)
    if unknown := set(names) - set(RUNS):
        raise InputError(f"--only {min(unknown)!r} is none of {', '.join(RUNS)}")
    if options.command == "write":
        found = run_all(ROOT, names)
        text = json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n"
        write_aside(options.output, text)
        print(f"{options.output}: {len(found)} runs")
        return 0
    wanted = read_golden(options.file) if options.against is None else None
    if wanted is None:
        with checkout(options.against) as tree:
            wanted = run_all(tree, names)
    else:
        names = [name for name in names if name in wanted]
    found = run_all(ROOT, names)
    problems = {name: difference(wanted[name], found[name]) for name in names}
    for name, problem in problems.items():
        print(f"{name}: {problem or 'equal'}")
    return 1 if any(problems.values()) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="run and keep losses and digests")
    write.add_argument("--output", type=file_to_write, required=True, help="the JSON file to write")
    check = commands.add_parser("check", help="run again and compare")
    check.add_argument("file", nargs="?", type=as_path, help="what `write` kept on this machine")
    check.add_argument("--against", metavar="REV", help="a commit to run and compare with instead")
    for command in (write, check):
        command.add_argument(
            "--only", nargs="+", metavar="NAME", help="some runs: " + "; ".join(RUNS)
        )
    options = parser.parse_args(argv)
    if options.command == "check" and (options.file is None) == (options.against is None):
        raise InputError("check needs a file or --against REV, one of the two")
    return options


def machine() -> dict[str, str]:
    """What bits depend on."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if "model name" in line), model)
    return {"processor": model, "torch": str(torch.__version__)}


def read_golden(file: Path) -> dict[str, Any]:
    """The runs in `file`; `InputError` if it is unreadable or of another machine."""
    try:
        golden = json.loads(file.read_text())
        written, runs = golden["machine"], golden["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a file of `write`: {error!r}") from None
    if written != machine():
        raise InputError(
            f"{file} was written on {written}, and this is {machine()}: bits differ between them; "
            "use --against REV, which runs both here"
        )
    return runs


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A checkout of `revision` aside; `InputError` if there is no such commit."""
    git = ["git", "-C", str(ROOT)]
    folder = Path(tempfile.mkdtemp(prefix="golden_")) / "tree"
    made = subprocess.run(
        [*git, "worktree", "add", "--detach", str(folder), revision], capture_output=True, text=True
    )
    try:
        if made.returncode:
            raise InputError(f"--against {revision}: {made.stderr.strip().splitlines()[-1]}")
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True)
        shutil.rmtree(folder.parent, ignore_errors=True)


def run_all(tree: Path, names: list[str]) -> dict[str, Any]:
    """Losses and digests of the runs `names` of the code in `tree`, by name."""
    with tempfile.TemporaryDirectory(prefix="golden_") as folder, JobServer(tree) as server:
        progress = tqdm(names, desc=tree.name, unit="run", disable=None)
        return {name: run(server, RUNS[name], Path(folder) / name) for name in progress}


def run(server: JobServer, golden: GoldenRun, folder: Path) -> dict[str, Any]:
    """Train half, resume, train the rest: what was reported, and digests of the last state."""
    folder.mkdir()
    checkpoints = folder / "checkpoints"
    paths = {"checkpoint.save": checkpoints, "checkpoint.load": checkpoints, "logging.dir": folder}
    for half in (HALF, {}):
        overrides = FIXED | golden.overrides | paths | half
        argv = ["--config", "configs/gpt_tiny.yaml", *(f"{k}={v}" for k, v in overrides.items())]
        result = server.run(argv, golden.processes, folder / "log.txt")
        if not result.ok:
            tail = "\n".join((folder / "log.txt").read_text().splitlines()[-20:])
            raise RuntimeError(f"{folder.name} {result}:\n{tail}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reports = [{key: line[key] for key in REPORTED if key in line} for line in lines]
    return {"reports": reports, "tensors": digests(checkpoints)}


def digests(root: Path) -> dict[str, str]:
    """The first 16 hex digits of the SHA-256 of every tensor in the newest checkpoint of `root`."""
    checkpoint = open_checkpoint(root)
    return {
        name: hashlib.sha256(_bytes(read_tensor(checkpoint, stored))).hexdigest()[:16]
        for name, stored in stored_tensors(checkpoint).items()
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first thing that differs between two results of `run`; None if nothing does."""
    for number, (one, two) in enumerate(zip(wanted["reports"], found["reports"], strict=False)):
        for key in one.keys() | two.keys():
            if one.get(key) != two.get(key):
                return f"report {number + 1}: {key} is {two.get(key)}, was {one.get(key)}"
    if len(wanted["reports"]) != len(found["reports"]):
        return f"{len(found['reports'])} reports, were {len(wanted['reports'])}"
    one, two = wanted["tensors"], found["tensors"]
    names = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    return f"{len(names)} of {len(one)} tensors, the first {names[0]}" if names else None


if __name__ == "__main__":
    sys.exit(run_command(main))
