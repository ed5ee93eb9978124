"""Documents of a corpus, one at a time: JSON lines or plain text, with where each came from.

JSON lines are one JSON object a line; blank lines are skipped. Plain text is one document a file,
or every non-blank line with `split_lines`. A file is read as JSON lines
if its name ends in `.jsonl`, `.ndjson` or `.json`, or if it begins like a JSON object or a list of
them. Text is UTF-8. Errors are reported with file and line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8lm.data.streams import COMPRESSED_SUFFIXES, CorpusStream
from fp8lm.runtime.errors import InputError

INPUT_FORMATS = ("auto", "jsonl", "text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
JSON_START = re.compile(rb"\s*(\{\s*(['\"}]|$)|\[\s*([{\"]|$))")
MAX_DOCUMENT_BYTES = 1 << 30
SAY_FORMAT = "say --input-format jsonl or text"


class BadDocument(InputError):
    """One document that cannot be used, of a corpus whose others may."""


@dataclass
class SkippedDocuments:
    """How many bad documents were left out, and what was wrong with the first."""

    count: int = 0
    first: str = ""
    noun: str = "bad document"

    def add(self, fault: str) -> None:
        """Count one."""
        self.first = self.first or fault
        self.count += 1

    def __str__(self) -> str:
        plural = f"{self.noun} is" if self.count == 1 else f"{self.noun}s are"
        return f"{self.count} {plural} left out, the first: {self.first}"


@dataclass(frozen=True)
class Record:
    """One undecoded document: cheap to read in order and to hand to another process."""

    source: str
    line: int  # from 1; 0 for a whole file
    data: bytes
    is_json: bool
    read_bytes: int  # of the file on disk since the record before
    too_long: bool = False

    @property
    def place(self) -> str:
        return f"{self.source}, line {self.line}" if self.line else self.source


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a tool that say how its input is read."""
    parser.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="auto, the default: jsonl if a file's name or its first bytes say so, else text",
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="a document that cannot be read ends the work (default), or is left out and counted",
    )


def check_inputs(paths: Iterable[str]) -> list[Path]:
    """The paths, each an existing file; `InputError` names one that is not."""
    files = [Path(path) for path in paths]
    for file in files:
        if not file.exists():
            raise InputError(f"input {file} does not exist: give JSON lines or plain text files")
        if file.is_dir():
            raise InputError(f"input {file} is a folder: give its files")
        if not (file.is_file() or file.is_fifo()):
            raise InputError(f"input {file} is neither a file nor a pipe")
    return files


def read_records(
    files: Iterable[Path], split_lines: bool = False, input_format: str = "auto"
) -> Iterator[Record]:
    """Every document's bytes, in the order of the files and of their lines.

    `InputError` for a file that cannot be read to its end.
    """
    for file in files:
        with CorpusStream(file) as stream:
            automatic = input_format == "auto"
            is_json = input_format == "jsonl" or (
                automatic and (is_json_name(file) or _begins_like_json(stream.peek()))
            )
            if is_json and _is_list(stream.peek()):
                raise InputError(
                    f"{file} is one JSON list, not one JSON object a line: convert it, with "
                    "jq -c '.[]' for instance (if this is no JSON: --input-format text)"
                )
            if is_json or split_lines:
                yield from _lines(stream, is_json)
                continue
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
            if automatic and _begins_like_json(data):
                raise InputError(f"{file} begins like JSON, after much white space: {SAY_FORMAT}")
            too_long = len(data) > MAX_DOCUMENT_BYTES
            yield Record(str(file), 0, data, False, stream.position, too_long)


def is_json_name(file: Path) -> bool:
    """Whether a file of this name, compressed or not, is read as JSON lines."""
    name = file.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(JSON_SUFFIXES)


def _begins_like_json(content: bytes) -> bool:
    return JSON_START.match(content) is not None


def _is_list(content: bytes) -> bool:
    """Whether a JSON list of several lines begins here.

    Its last item may be a line that can be read: left to skip bad lines, all others would go.
    """
    first, end, _ = content.lstrip().partition(b"\n")
    first = first.rstrip()
    return bool(end) and (first == b"[" or (first.startswith(b"[{") and first[-1:] != b"]"))


def _lines(stream: CorpusStream, is_json: bool) -> Iterator[Record]:
    number = before = 0
    while line := stream.line(MAX_DOCUMENT_BYTES + 1):
        number += 1
        too_long = len(line) > MAX_DOCUMENT_BYTES
        if too_long:
            line, rest = b"x", line
            while rest and not rest.endswith(b"\n"):
                rest = stream.line(1 << 20)
        if line.strip():
            yield Record(
                str(stream.path), number, line, is_json, stream.position - before, too_long
            )
            before = stream.position


def parse_record(record: Record, keys: Iterable[str]) -> dict[str, str]:
    """The texts of a document by key; plain text has the one key `text`.

    `BadDocument` where it is not as it should be.
    """
    check_size(record)
    if record.is_json:
        fields = parse_fields(record)
    else:
        text = _decode(record)
        # Of a document that is a line, the line end belongs to the file.
        fields = {"text": text.rstrip("\r\n") if record.line else text}
        if "\0" in text:
            line = record.line or text.count("\n", 0, text.index("\0")) + 1
            raise BadDocument(f"{record.source}, line {line}: a NUL byte, which text has not")
    return {key: _text_of(fields, key, record) for key in keys}


def check_size(record: Record) -> None:
    """`BadDocument` for one of which not all was read."""
    if record.too_long:
        raise BadDocument(
            f"{record.place}: a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB: "
            "divide it (--split-lines makes a document of every line of plain text)"
        )


def _decode(record: Record) -> str:
    try:
        return record.data.decode("utf-8")
    except UnicodeDecodeError as err:
        line = record.line or record.data.count(b"\n", 0, err.start) + 1
        raise BadDocument(f"{record.source}, line {line}: not UTF-8 text") from None


def parse_fields(record: Record) -> dict:
    """The JSON object of a line; `BadDocument` where there is none."""
    expected = "expected one JSON object a line (if this is no JSON: --input-format text)"
    try:
        fields = json.loads(_decode(record))
    except json.JSONDecodeError as err:
        raise BadDocument(
            f"{record.place}: invalid JSON ({err.msg} at column {err.colno}): {expected}"
        ) from None
    except ValueError as err:  # Python's limit on the digits of an integer
        reason = str(err).partition(";")[0]
        raise BadDocument(f"{record.place}: JSON that cannot be read: {reason}") from None
    except RecursionError:
        raise BadDocument(f"{record.place}: JSON that is nested too deeply") from None
    if not isinstance(fields, dict):
        raise BadDocument(f"{record.place}: {expected}")
    return fields


def _text_of(fields: dict, key: str, record: Record) -> str:
    if key not in fields:
        present = ", ".join(repr(name[:40]) for name in list(fields)[:8]) or "none"
        raise BadDocument(f"{record.place}: no key {key!r} (its keys: {present}): see --json-keys")
    text = fields[key]
    if not isinstance(text, str):
        raise BadDocument(f"{record.place}: the value of {key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument(
            f"{record.place}: {key!r} holds half a surrogate pair, which is not text"
        ) from None
    return text
