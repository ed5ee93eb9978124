"""Instructions and preferences from the functions of the Python that runs this: no download.

python tools/build_instructions.py --output runs/tuning/data [--count 2400]

A user shows the first line of a function and asks for its name; an answer is one of two forms:

    terse      `name`
    sentence   It is called `name`.

DIR/chats.jsonl has conversations, each answered in a form that a hash of the line chooses.
DIR/pairs.jsonl has preferences for others: terse is preferred for a function without parameters,
the sentence for one with some, half of each. So which form is preferred depends on the question,
and a model that was tuned on the conversations knows both and prefers neither.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from fp8lm.arguments import number_type, path_text
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

LONGEST = 60  # characters of a line
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "lib2to3"}
FORMS = ("`{}`", "It is called `{}`.")  # terse, sentence
FORMAT = r"`\w+`|It is called `\w+`\."
QUESTION = "What is the name?\n{}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=path_text, required=True, metavar="DIR")
    add("--count", type=number_type(20), default=2400, help="lines of each file (default: 2400)")
    standard = sysconfig.get_path("stdlib")
    add("--sources", type=path_text, default=standard, help="default: the standard library")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    root = Path(args.sources)
    lines = sorted(set(function_lines(root)), key=lambda pair: digest(pair[0]))
    half = args.count // 2
    pairs = [pair for pair in lines if digest(pair[0]) % 2]
    without = [pair for pair in pairs if not pair[1]][:half]
    with_some = [pair for pair in pairs if pair[1]][:half]
    chats = [pair for pair in lines if not digest(pair[0]) % 2][: args.count]
    if len(chats) < args.count or len(without) < half or len(with_some) < half:
        raise InputError(
            f"--count {args.count}: {root} has {len(chats)} functions for conversations, "
            f"{len(without)} and {len(with_some)} for preferences: lower it"
        )
    alternating = chain.from_iterable(zip(without, with_some, strict=True))
    write(Path(args.output) / "chats.jsonl", map(conversation, chats))
    write(Path(args.output) / "pairs.jsonl", map(preference, alternating))


def function_lines(root: Path) -> Iterator[tuple[str, bool]]:
    """The first line of every function below `root`, and whether it has parameters but `self`."""
    for file in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in strings
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                line = f"def {node.name}({ast.unparse(node.args)}):"
                names = [each.arg for each in node.args.args if each.arg not in ("self", "cls")]
                others = node.args.kwonlyargs or node.args.vararg or node.args.kwarg
                if len(line) <= LONGEST and line.isascii():
                    yield line, bool(names or others)


def conversation(pair: tuple[str, bool]) -> dict[str, object]:
    """A line of chats.jsonl."""
    line, _ = pair
    answer = FORMS[digest(line) // 2 % 2].format(name_of(line))
    return {"messages": [*question(line), {"role": "assistant", "content": answer}]}


def preference(pair: tuple[str, bool]) -> dict[str, object]:
    """A line of pairs.jsonl."""
    line, has_parameters = pair
    answers = [[{"role": "assistant", "content": form.format(name_of(line))}] for form in FORMS]
    chosen, rejected = reversed(answers) if has_parameters else answers
    return {"prompt": question(line), "chosen": chosen, "rejected": rejected}


def question(line: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION.format(line)}]


def name_of(line: str) -> str:
    return line.removeprefix("def ").partition("(")[0]


def digest(line: str) -> int:
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big")


def write(path: Path, objects: Iterator[dict[str, object]]) -> None:
    lines = [json.dumps(fields) + "\n" for fields in islice(objects, None)]
    write_aside(path, "".join(lines))
    print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    sys.exit(run_command(main))
