"""What the files in configs/ say of themselves: a launch line, and the arithmetic below it."""

from __future__ import annotations

import re
import shlex
import textwrap

from fp8lm.config import load_config
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.launch.options import parse_options
from fp8lm.planner.plan import plan_run

WIDTH = 100
LAUNCH = re.compile(r"#   scripts/train(?:_multinode)?\.sh (.*)")


def launch_options(path):
    """The options of the launch line in a config's opening comment."""
    words = [shlex.split(m[1]) for m in map(LAUNCH.fullmatch, opening(path)) if m]
    assert len(words) == 1, f"{path}: one launch line expected"
    return parse_options([*words[0], "--dry-run"])


def opening(path):
    """The lines before the first key."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def arithmetic(path):
    """What the code computes for that launch line, as comment lines."""
    options = launch_options(path)
    config = load_config(path)
    size = options.nproc_per_node or 1
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    plan = plan_run(config, num_ids, options.nnodes * size, size)
    return [f"# {part}" for line in plan.summary() for part in wrapped(line)]


def wrapped(line):
    return textwrap.wrap(line, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False)
