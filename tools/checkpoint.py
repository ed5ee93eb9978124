"""Look at checkpoints, check them, compare them, and make smaller ones of them.

python tools/checkpoint.py list    FOLDER                    iterations, sizes, what is wrong
python tools/checkpoint.py inspect FOLDER [--tensors GLOB] [--config]
python tools/checkpoint.py verify  FOLDER                    SHA-256 of every file, exit code 1
python tools/checkpoint.py compare FOLDER FOLDER             bit for bit; exit code 1 if different
python tools/checkpoint.py release FOLDER OUTPUT             the model without optimizer states
python tools/checkpoint.py merge   FOLDER OUTPUT             as one process would have written it

FOLDER is what checkpoint.save named, or one checkpoint in it (.../iter_0000100); of the former,
inspect, compare, release and merge take the newest valid one. Needs no GPU and no process group,
and works on a checkpoint of any number of processes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from fp8lm.arguments import as_path
from fp8lm.checkpoint import Checkpoint, SaveError, StateKey, open_checkpoint
from fp8lm.checkpoint.files import LATEST, find_folder, latest_iteration, saved_iterations
from fp8lm.checkpoint.location import locate, why_none
from fp8lm.checkpoint.reader import (
    CIRCUMSTANCES,
    StoredTensor,
    copy_checkpoint,
    differences,
    read_tensor,
    stored_tensors,
)
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.runtime.run_lock import RunFolder, RunLocks

KINDS = ("model", "optimizer.master", "optimizer.exp_avg", "optimizer.exp_avg_sq")
MOST_DIFFERENCES = 20


def main(argv: list[str]) -> int:
    """Do what the first argument says; the exit code."""
    options = parse(argv)
    return options.command(options) or 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    lines = __doc__.splitlines()
    parser = CommandParser(
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (list_all, inspect, verify, compare, release, merge):
        name = command.__name__.removesuffix("_all")
        sub = commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0])
        sub.set_defaults(command=command)
        sub.add_argument("folder", type=as_path)
        if command is compare:
            sub.add_argument("other", type=as_path)
        if command in (release, merge):
            sub.add_argument("output", type=as_path)
        if command is inspect:
            sub.add_argument("--tensors", metavar="GLOB", help="print these, with their scales")
            sub.add_argument("--config", action="store_true", help="print the config it ran with")
    return parser.parse_args(argv)


def list_all(options: argparse.Namespace) -> None:
    """List the checkpoints of a folder."""
    root, iterations = which(options.folder)
    checked = [(iteration, problem_of(root, iteration)) for iteration in iterations]
    print(f"{'iteration':>10}  {'bytes':>14}  {'files':>5}  {'written':16}  state")
    for iteration, problem in checked:
        state = problem or ("valid, latest" if iteration == latest(root) else "valid")
        print(f"{iteration:10d}  {size_and_time(root, iteration)}  {state}")


def inspect(options: argparse.Namespace) -> None:
    """Show what is in a checkpoint."""
    checkpoint = open_one(options.folder)
    config = checkpoint.common.get("config", {})
    if options.config:
        if not config:
            raise InputError(f"{checkpoint.folder} says nothing of the config it ran with")
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return
    if options.tensors:
        for stored in stored_tensors(checkpoint, options.tensors).values():
            print(f"{stored.name}: {stored}{value_of(checkpoint, stored)}")
        return
    print(checkpoint.folder)
    facts = {key: value for key, value in checkpoint.common.items() if key != "config"}
    print(indent(yaml.safe_dump(facts, sort_keys=False, width=math.inf), "  "), end="")
    print("  precision:", config.get("precision", {}).get("preset", "unknown"))
    tensors = stored_tensors(checkpoint).values()
    for kind in KINDS:
        for dtype, count, elements, size in totals(t for t in tensors if is_of(kind, t)):
            print(f"  {kind}: {count} payloads, {elements:,} elements in {dtype}, {size:,} bytes")


def verify(options: argparse.Namespace) -> int:
    """Check every file against its SHA-256."""
    root, iterations = which(options.folder)
    bad = 0
    for iteration in iterations:
        problem = problem_of(root, iteration)
        print(f"iteration {iteration}: {problem or 'valid'}")
        bad += problem is not None
    return 1 if bad else 0


def compare(options: argparse.Namespace) -> int:
    """Compare two checkpoints bit for bit."""
    one, two = open_one(options.folder), open_one(options.other)
    shown = 0
    for difference in differences(one, two):
        shown += 1
        if shown <= MOST_DIFFERENCES:
            print(difference)
    if shown > MOST_DIFFERENCES:
        print(f"and {shown - MOST_DIFFERENCES} more differences")
    if not shown:
        count = len(stored_tensors(one))
        print(f"equal: {count} tensors, every fact but {', '.join(CIRCUMSTANCES)}")
    return 1 if shown else 0


def release(options: argparse.Namespace) -> None:
    """Keep the model, without optimizer states."""
    rewrite(options, is_weight, {"released": True})


def merge(options: argparse.Namespace) -> None:
    """Rewrite a checkpoint as one process would have written it."""
    rewrite(options, lambda name: True, {})


def rewrite(
    options: argparse.Namespace, keep: Callable[[str], bool], facts: dict[str, Any]
) -> None:
    """Write the tensors that `keep` wants, with more `facts`, to a folder that has no checkpoint.

    Raises `InputError` for a folder that has one, or in which a run is writing.
    """
    output = options.output
    refuse_checkpoints(output)
    checkpoint = open_one(options.folder)
    complaint = f"could not write the checkpoint of iteration {checkpoint.iteration} in {output}"
    locks = RunLocks(say=lambda line: print(line, file=sys.stderr))
    locks.take([RunFolder(str(output), str(output), complaint)])
    try:
        refuse_checkpoints(output)  # none has come before it was ours
        folder = copy_checkpoint(checkpoint, output, keep, facts, locks.verify)
    except SaveError as error:
        raise InputError(str(error)) from error
    finally:
        locks.release()
    before, after = (
        sum(file.stat().st_size for file in f.iterdir()) for f in (checkpoint.folder, folder)
    )
    print(f"{folder}: {after:,} bytes, from {before:,}")


def refuse_checkpoints(output: Path) -> None:
    """`InputError` if there are any in `output`, or parts of one."""
    if taken := [path.name for path in (*output.glob("*iter_*"), *output.glob(LATEST))]:
        raise InputError(f"{output} holds checkpoints ({taken[0]}): name a folder that has none")


def open_one(path: Path) -> Checkpoint:
    """The checkpoint `path`, or the newest valid one in it."""
    checkpoint = open_checkpoint(path)
    for problem in checkpoint.passed_over:
        print(f"warning: passed over {problem}", file=sys.stderr)
    return checkpoint


def which(path: Path) -> tuple[Path, list[int]]:
    """The folder of checkpoints that `path` is or is in, and which of them, oldest first."""
    root, iteration = locate(path)
    iterations = sorted(saved_iterations(root))
    if iteration is not None:
        iterations = [number for number in iterations if number == iteration]
    if not iterations:
        if iteration is not None:
            raise InputError(f"no checkpoint {path}")
        raise InputError(f"no checkpoint in {path}: {why_none(root)}")
    return root, iterations


def problem_of(root: Path, iteration: int) -> str | None:
    """What is wrong with a checkpoint, None if nothing."""
    try:
        open_checkpoint(root, iteration)
    except InputError as error:
        return str(error)
    return None


def size_and_time(root: Path, iteration: int) -> str:
    """Columns of the list: bytes, files of tensors, when written; blanks for one that has gone."""
    try:
        folder = find_folder(root, iteration)
        files = [] if folder is None else [path for path in folder.iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        written = folder.stat().st_mtime if folder is not None and files else None
        when = "" if written is None else f"{datetime.fromtimestamp(written):%Y-%m-%d %H:%M}"
    except OSError:  # a run deletes what its retention does not keep
        files, size, when = [], 0, ""
    tensors = sum(path.suffix == ".distcp" for path in files)
    return f"{size:14,d}  {tensors:5d}  {when:16}"


def latest(root: Path) -> int | None:
    """What the latest file says, None if nothing."""
    try:
        return latest_iteration(root)
    except InputError:
        return None


def is_weight(name: str) -> bool:
    """Whether a tensor is a model parameter's payload or scale."""
    key = StateKey.parse(name)
    return key is not None and key.kind == "weight"


def is_of(kind: str, stored: StoredTensor) -> bool:
    """Whether `stored` is a payload of `kind`."""
    key = StateKey.parse(stored.name)
    return key is not None and key.section == kind and key.field == "payload"


def totals(tensors: Iterable[StoredTensor]) -> list[tuple[str, int, int, int]]:
    """Format, number of tensors, elements and bytes, by dtype."""
    sums: dict[str, tuple[int, int, int]] = {}
    for stored in tensors:
        dtype = str(stored.dtype).removeprefix("torch.")
        count, elements, size = sums.get(dtype, (0, 0, 0))
        elements += stored.nbytes // stored.dtype.itemsize
        sums[dtype] = (count + 1, elements, size + stored.nbytes)
    return [(dtype, *row) for dtype, row in sorted(sums.items())]


def value_of(checkpoint: Checkpoint, stored: StoredTensor) -> str:
    """The value of a scalar, or the scale of a payload, in words."""
    if not stored.shape:
        return f" = {read_tensor(checkpoint, stored).item()}"
    key = StateKey.parse(stored.name)
    if key is None or key.field != "payload":
        return ""
    scales = stored_tensors(checkpoint, str(replace(key, field="scale")))
    single = [scale for scale in scales.values() if not scale.shape]
    return "".join(f", scale {read_tensor(checkpoint, scale).item()}" for scale in single)


if __name__ == "__main__":
    sys.exit(run_command(main))
