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
import re
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import yaml

from fp8lm.checkpoint import Checkpoint, open_checkpoint
from fp8lm.checkpoint.contents import (
    CIRCUMSTANCES,
    StoredTensor,
    copy_checkpoint,
    differences,
    read_tensor,
    stored_tensors,
)
from fp8lm.checkpoint.files import find_folder, latest_iteration, saved_iterations
from fp8lm.errors import CommandParser, InputError, run_command

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
        sub = commands.add_parser(name, help=command.__doc__.splitlines()[0])
        sub.set_defaults(command=command)
        sub.add_argument("folder", type=Path)
        if command is compare:
            sub.add_argument("other", type=Path)
        if command in (release, merge):
            sub.add_argument("output", type=Path)
        if command is inspect:
            sub.add_argument("--tensors", metavar="GLOB", help="print these, with their scales")
            sub.add_argument("--config", action="store_true", help="print the config it ran with")
    return parser.parse_args(argv)


def list_all(options: argparse.Namespace) -> None:
    """List the checkpoints of a folder."""
    root = options.folder
    checked = list(check_all(root))
    print(f"{'iteration':>10}  {'bytes':>14}  {'files':>5}  {'written':16}  state")
    for iteration, problem in checked:
        folder = find_folder(root, iteration)
        files = [path for path in folder.iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        when = datetime.fromtimestamp(folder.stat().st_mtime)
        tensors = sum(path.suffix == ".distcp" for path in files)
        state = problem or ("valid, latest" if iteration == latest(root) else "valid")
        print(f"{iteration:10d}  {size:14,d}  {tensors:5d}  {when:%Y-%m-%d %H:%M}  {state}")


def inspect(options: argparse.Namespace) -> None:
    """Show what is in a checkpoint."""
    checkpoint = open_one(options.folder)
    if options.config:
        print(yaml.safe_dump(checkpoint.common["config"], sort_keys=False), end="")
        return
    if options.tensors:
        for stored in stored_tensors(checkpoint, options.tensors).values():
            print(f"{stored.name}: {stored}{value_of(checkpoint, stored)}")
        return
    print(checkpoint.folder)
    for key, value in checkpoint.common.items():
        if key != "config":
            print(f"  {key}: {value}")
    print("  precision:", checkpoint.common["config"]["precision"]["preset"])
    tensors = stored_tensors(checkpoint).values()
    for kind in KINDS:
        for dtype, count, elements, size in totals(t for t in tensors if is_of(kind, t)):
            print(f"  {kind}: {count} payloads, {elements:,} elements in {dtype}, {size:,} bytes")


def verify(options: argparse.Namespace) -> int:
    """Check every file against its SHA-256."""
    bad = 0
    for iteration, problem in check_all(options.folder):
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
    checkpoint = open_one(options.folder)
    folder = copy_checkpoint(
        checkpoint, options.output, lambda name: name.startswith("model."), {"released": True}
    )
    say_sizes(checkpoint, folder)


def merge(options: argparse.Namespace) -> None:
    """Rewrite a checkpoint as one process would have written it."""
    checkpoint = open_one(options.folder)
    say_sizes(checkpoint, copy_checkpoint(checkpoint, options.output, lambda name: True, {}))


def open_one(path: Path) -> Checkpoint:
    """The checkpoint `path`, or the newest valid one in it."""
    if match := re.fullmatch(r"iter_(\d+)", path.name):
        return open_checkpoint(path.parent, int(match[1]))
    checkpoint = open_checkpoint(path)
    for problem in checkpoint.passed_over:
        print(f"warning: passed over {problem}", file=sys.stderr)
    return checkpoint


def check_all(path: Path) -> Iterable[tuple[int, str | None]]:
    """Every checkpoint of a folder, oldest first, and what is wrong with it."""
    match = re.fullmatch(r"iter_(\d+)", path.name)
    root, iterations = path, sorted(saved_iterations(path))
    if match:
        root, iterations = path.parent, [int(match[1])]
    if not iterations:
        raise InputError(f"no checkpoint in {path}")
    for iteration in iterations:
        try:
            open_checkpoint(root, iteration)
        except InputError as error:
            yield iteration, str(error)
        else:
            yield iteration, None


def latest(root: Path) -> int | None:
    """What the latest file says, None if nothing."""
    try:
        return latest_iteration(root)
    except InputError:
        return None


def is_of(kind: str, stored: StoredTensor) -> bool:
    """Whether `stored` is a payload of `kind`."""
    return stored.name.startswith(f"{kind}.") and stored.name.endswith(".payload")


def totals(tensors: Iterable[StoredTensor]) -> list[tuple[str, int, int, int]]:
    """Format, number of tensors, elements and bytes, by dtype."""
    sums: dict[str, list[int]] = {}
    for stored in tensors:
        row = sums.setdefault(str(stored.dtype).removeprefix("torch."), [0, 0, 0])
        row[0] += 1
        row[1] += stored.nbytes // stored.dtype.itemsize
        row[2] += stored.nbytes
    return [(dtype, *row) for dtype, row in sorted(sums.items())]


def value_of(checkpoint: Checkpoint, stored: StoredTensor) -> str:
    """The value of a scalar, or the scale of a payload, in words."""
    if not stored.shape:
        return f" = {read_tensor(checkpoint, stored).item()}"
    scales = stored_tensors(checkpoint, stored.name.removesuffix(".payload") + ".scale")
    return "".join(f", scale {read_tensor(checkpoint, s).item()}" for s in scales.values())


def say_sizes(source: Checkpoint, folder: Path) -> None:
    """Print what was written."""
    before, after = (
        sum(file.stat().st_size for file in f.iterdir()) for f in (source.folder, folder)
    )
    print(f"{folder}: {after:,} bytes, from {before:,}")


if __name__ == "__main__":
    sys.exit(run_command(main))
