"""Break one line at a time, drawn at random from a seed, and see whether the tests notice.

python tools/mutate.py --count 50 --seed 1 [--under fp8lm/comm ...] [--json FILE]

Faults of distributed code are silent: a sum over the wrong group, a rank that is passed over, a
stale scale, a wrong owner. Each mutation is one such slip in a copy of the checkout:

    group       a process group, or an axis, is another one
    call        what is called for its effect is not called
    argument    the value is used without the call around it: a sum, a maximum, a cast
    compare     == is !=, < is <=, > is >=
    arithmetic  + is -, * is //, // is *
    constant    a number is one more, a flag the other
    choice      the two sides of `a if c else b`, min and max, all and any

Tests of the mutated package run first, then the others that hold it (`TESTS`), until one fails.
One line per mutation; exit code 1 if any survives. A mutation whose outcome is in the --json file
is not tried again: a long series can be run in parts. A survivor is a line that no test needs, an
equivalent program, or a missing test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fp8lm.arguments import file_to_write
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

ROOT = Path(__file__).resolve().parents[1]
UNDER = (
    "fp8lm/comm",
    "fp8lm/gradient",
    "fp8lm/parallel",
    "fp8lm/optim/sharding.py",
    "fp8lm/optim/step_scalars.py",
    "fp8lm/optim/clipping.py",
    "fp8lm/layers/linear.py",
    "fp8lm/layers/embedding.py",
    "fp8lm/layers/cross_entropy.py",
)
# After a package's own tests, in this order: fast ones first.
TESTS = (
    "tests/comm",
    "tests/gradient",
    "tests/parallel",
    "tests/optim",
    "tests/layers",
    "tests/training/test_no_host_sync.py",
    "tests/planner/test_layout.py",
    "tests/telemetry",
    "tests/training/test_frozen.py",
    "tests/training/test_tensor_parallel.py",
    "tests/training/test_pipeline_parallel.py",
    "tests/training/test_data_parallel.py",
    "tests/tools/test_fuzz_layouts.py",
)
LIMIT = 1200  # seconds for the tests of one mutation; one that hangs is noticed
WORKERS = 2
GROUPS = ("tensor_parallel", "data_parallel", "pipeline_parallel", "world")
CHOICES = {"min": "max", "max": "min", "all": "any", "any": "all"}
COMPARED = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutation:
    """Line `line` of `file` (from 1), what it was and is; `kind` as in the module."""

    file: str
    line: int
    kind: str
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """`caught_by`: the first test that failed, or why the tests ended; None: it survived."""

    mutation: Mutation
    caught_by: str | None
    seconds: float


def group(node: ast.AST) -> ast.AST | None:
    """Another process group of a job, or another axis of its dimensions."""
    if isinstance(node, ast.Attribute) and node.attr in GROUPS:
        other = GROUPS[(GROUPS.index(node.attr) + 1) % 3]
        return ast.Attribute(node.value, other, node.ctx)
    if isinstance(node, ast.Constant) and node.value in ("tp", "dp", "pp"):
        return ast.Constant({"tp": "dp", "dp": "tp", "pp": "dp"}[node.value])
    return None


def call(node: ast.AST) -> ast.AST | None:
    """Nothing, where something was called for its effect."""
    is_effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return ast.Pass() if is_effect else None


def argument(node: ast.AST) -> ast.AST | None:
    """The argument of a call instead of its result."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        return node.args[0]
    return None


def compare(node: ast.AST) -> ast.AST | None:
    """The other comparison."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        return ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)
    return None


def arithmetic(node: ast.AST) -> ast.AST | None:
    """The other operation."""
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        return ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    return None


def constant(node: ast.AST) -> ast.AST | None:
    """One more, or the other flag."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return ast.Constant(node.value + 1)
    return None


def choice(node: ast.AST) -> ast.AST | None:
    """The other side."""
    if isinstance(node, ast.IfExp):
        return ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Name) and node.id in CHOICES:
        return ast.Name(CHOICES[node.id], node.ctx)
    if isinstance(node, ast.Attribute) and node.attr in CHOICES:
        return ast.Attribute(node.value, CHOICES[node.attr], node.ctx)
    return None


KINDS: tuple[Callable[[ast.AST], ast.AST | None], ...] = (
    group,
    call,
    argument,
    compare,
    arithmetic,
    constant,
    choice,
)


def mutations_of(source: str, file: str) -> Iterator[Mutation]:
    """Every mutation of one line of `source`."""
    lines = source.splitlines()
    for node in _code(ast.parse(source)):
        if not isinstance(node, ast.expr | ast.stmt) or node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        start = len(line.encode()[: node.col_offset].decode())
        stop = len(line.encode()[: node.end_col_offset].decode())
        for kind in KINDS:
            changed = kind(copy.deepcopy(node))
            if changed is None:
                continue
            text = ast.unparse(ast.fix_missing_locations(changed))
            if not isinstance(changed, ast.Pass | ast.Name | ast.Constant | ast.Attribute):
                text = f"({text})"
            after = line[:start] + text + line[stop:]
            if _parses(lines, node.lineno, after) and after != line:
                yield Mutation(file, node.lineno, kind.__name__, line.strip(), after.strip())


def _parses(lines: list[str], number: int, after: str) -> bool:
    try:
        ast.parse("\n".join([*lines[: number - 1], after, *lines[number:]]))
    except SyntaxError:
        return False
    return True


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: no annotations, no docstrings, no messages of errors."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            continue
        if isinstance(node, ast.arg) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            continue
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield node.value
                yield from _code(node.value)
            continue
        if isinstance(node, ast.FunctionDef):
            for part in (*node.args.defaults, *node.body):
                yield part
                yield from _code(part)
            continue
        yield node
        yield from _code(node)


def draw(root: Path, under: list[str], count: int, seed: int) -> list[Mutation]:
    """`count` mutations, every kind as likely as another; InputError if there are not so many."""
    found: dict[str, list[Mutation]] = {}
    for place in under:
        path = root / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(f"--under {place}: no Python file of this checkout")
        for file in files:
            for mutation in mutations_of(file.read_text(), str(file.relative_to(root))):
                found.setdefault(mutation.kind, []).append(mutation)
    if sum(map(len, found.values())) < count:
        raise InputError(f"--count {count}: there are {sum(map(len, found.values()))} mutations")
    generator = random.Random(seed)
    drawn: list[Mutation] = []
    kinds = sorted(found)
    while len(drawn) < count:
        kind = generator.choice([kind for kind in kinds if found[kind]])
        own = found[kind]
        drawn.append(own.pop(generator.randrange(len(own))))
    return drawn


def tests_for(file: str) -> list[str]:
    """Paths of tests, those of the file's package first."""
    own = str(Path("tests", *Path(file).parts[1:-1]))
    return [own, *(test for test in TESTS if test != own)]


@contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """Within, the line of `tree` is what the mutation makes of it."""
    path = tree / mutation.file
    source = path.read_text()
    lines = source.splitlines()
    line = lines[mutation.line - 1]
    lines[mutation.line - 1] = line[: len(line) - len(line.lstrip())] + mutation.after
    path.write_text("\n".join(lines) + "\n")
    try:
        yield
    finally:
        path.write_text(source)


def run_tests(tree: Path, tests: list[str], limit: float, workers: int = 0) -> str | None:
    """What ended the tests early; None if all passed. They run in `workers` processes, or one."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    if workers:
        in_order = ("--dist", "loadfile", "--no-loadscope-reorder")
        command += ["-n", str(workers), *in_order]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with in_own_group([*command, "-m", "not gpu", *tests], cwd=tree, env=environment) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"still running after {limit:.0f} s"
    if process.returncode == 0:
        return None
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"pytest ended with {process.returncode}"


@contextmanager
def in_own_group(command: list[str], **keys: Any) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is read; with all that it has started it ends where the block does."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        **keys,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(outcomes: list[Outcome], seed: int) -> dict[str, object]:
    """Counts, and every mutation with what became of it."""
    survived = [outcome for outcome in outcomes if outcome.caught_by is None]
    return {
        "seed": seed,
        "count": len(outcomes),
        "caught": len(outcomes) - len(survived),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "mutations": [asdict(outcome) for outcome in outcomes],
    }


def read_outcomes(path: Path | None) -> list[Outcome]:
    """What a report at `path` says of every mutation; nothing where there is none."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())["mutations"]
    return [
        Outcome(**{**outcome, "mutation": Mutation(**outcome["mutation"])}) for outcome in found
    ]


def main(argv: list[str]) -> int:
    """Draw, break, test, print."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10, help="mutations (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: 1)")
    parser.add_argument("--under", nargs="+", default=list(UNDER), help="files and folders")
    parser.add_argument("--list", action="store_true", help="only print the mutations")
    parser.add_argument("--json", type=file_to_write, help="file for the outcome of every mutation")
    arguments = parser.parse_args(argv)
    drawn = draw(ROOT, arguments.under, arguments.count, arguments.seed)
    if arguments.list:
        print("\n".join(map(describe, drawn)))
        return 0
    outcomes = try_all(drawn, arguments)
    print(f"{sum(o.caught_by is not None for o in outcomes)} of {len(outcomes)} caught")
    return int(any(outcome.caught_by is None for outcome in outcomes))


def try_all(drawn: list[Mutation], arguments: argparse.Namespace) -> list[Outcome]:
    """The outcome of each, printed as it comes and written to `--json` after each."""
    outcomes = [tried for tried in read_outcomes(arguments.json) if tried.mutation in drawn]
    known = {outcome.mutation for outcome in outcomes}
    drawn = [mutation for mutation in drawn if mutation not in known]
    with tempfile.TemporaryDirectory(prefix="fp8lm_mutate_") as folder:
        tree = Path(folder, "tree")
        kept = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=kept)
        for mutation in tqdm(drawn, unit="mutation", disable=None):
            started = time.monotonic()
            with mutated(tree, mutation):
                own, *others = tests_for(mutation.file)
                caught = run_tests(tree, [own], LIMIT) or run_tests(tree, others, LIMIT, WORKERS)
            outcomes.append(Outcome(mutation, caught, time.monotonic() - started))
            tqdm.write(f"{describe(mutation)}\n    {caught or 'SURVIVED'}")
            if arguments.json:
                text = json.dumps(report(outcomes, arguments.seed), indent=1) + "\n"
                write_aside(arguments.json, text)
    return outcomes


def describe(mutation: Mutation) -> str:
    """One mutation as two lines."""
    where = f"{mutation.file}:{mutation.line} ({mutation.kind})"
    return f"{where}\n    {mutation.before}\n    {mutation.after}"


if __name__ == "__main__":
    sys.exit(run_command(main))
