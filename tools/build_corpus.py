"""Build a small corpus from the text that every Python installation carries.

python tools/build_corpus.py --output data/corpus

Writes DIR/corpus.jsonl, one {"path", "text"} object a line: the standard library's sources
without tests and tables, its text files, and the language reference that `help()` shows, topic by
topic. The order is that of the hashes of the paths: the same on every run, and random enough that
a split by documents is a fair one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fp8lm.arguments import finite, path_text
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

SUFFIXES = (".py", ".txt", ".rst")
# Tests, other people's packages, copies, and tables of code points: no text to learn from.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"),
    *("__pycache__", "encodings", "_bundled", "_vendor"),
}
SKIPPED_NAMES = ("_sysconfigdata",)  # the builder's machine, written as a dict
TOPICS = Path("pydoc_data") / "topics.py"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=path_text, required=True, metavar="DIR", help="writes DIR/corpus.jsonl"
    )
    parser.add_argument("--max-mb", type=finite, help="stop before so much text (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    counts: Counter[str] = Counter()
    documents = collect(Path(sysconfig.get_path("stdlib")), counts)
    chosen = limit(documents, None if args.max_mb is None else int(args.max_mb * 1e6))
    if not chosen:
        raise InputError(
            f"no text found: {counts['documents']} documents in {sysconfig.get_path('stdlib')}, "
            f"--max-mb {args.max_mb}: use a Python with its library's sources, or raise the limit"
        )
    lines = [json.dumps({"path": path, "text": text}) + "\n" for path, text in chosen]
    output = Path(args.output) / "corpus.jsonl"
    write_aside(output, "".join(lines).encode())
    megabytes = sum(len(text.encode()) for _, text in chosen) / 1e6
    print(
        f"{output}: {len(chosen)} documents, {megabytes:.1f} MB "
        f"(left out: {counts['duplicates']} duplicates, {counts['empty']} empty, "
        f"{counts['undecodable']} not UTF-8, {len(documents) - len(chosen)} by --max-mb)"
    )


def collect(root: Path, counts: Counter) -> list[tuple[str, str]]:
    """Distinct (path, text) below `root`, by the hash of the path; counts what is left out."""
    by_hash = {sha256(path): (path, text) for path, text in read_texts(root, counts)}
    documents, seen = [], set()
    for _, (path, text) in sorted(by_hash.items()):
        digest = sha256(text)
        if not text.strip():
            counts["empty"] += 1
        elif digest in seen:
            counts["duplicates"] += 1
        else:
            seen.add(digest)
            documents.append((path, text))
    counts["documents"] = len(documents)
    return documents


def read_texts(root: Path, counts: Counter) -> Iterator[tuple[str, str]]:
    for file in root.rglob("*"):
        path = file.relative_to(root)
        if file.suffix not in SUFFIXES or SKIPPED_FOLDERS & set(path.parts[:-1]):
            continue
        if file.name.startswith(SKIPPED_NAMES) or not file.is_file():
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            counts["undecodable"] += 1
            continue
        if path == TOPICS:
            yield from read_topics(text)
        else:
            yield path.as_posix(), text


def read_topics(source: str) -> Iterator[tuple[str, str]]:
    """The reference's topics, which the file keeps as one dict of strings."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            for name, text in ast.literal_eval(node.value).items():
                yield f"{TOPICS.as_posix()}/{name}", text


def limit(documents: list[tuple[str, str]], max_bytes: int | None) -> list[tuple[str, str]]:
    """The first documents whose text together stays within `max_bytes`."""
    if max_bytes is None:
        return documents
    total = 0
    for count, (_, text) in enumerate(documents):
        total += len(text.encode())
        if total > max_bytes:
            return documents[:count]
    return documents


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(run_command(main))
