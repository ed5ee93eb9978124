"""Documents of a corpus, one at a time: JSON lines or plain text, with where each came from.

Files named `.jsonl` or `.json` hold one JSON object a line; blank lines are skipped. Any other
file is plain text: the whole file is one document, or every non-blank line with `split_lines`.
Text is UTF-8. What is wrong is reported with the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8lm.errors import InputError

JSON_SUFFIXES = (".jsonl", ".json")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One undecoded document: cheap to read in order and to hand to another process."""

    source: str
    line: int  # from 1; 0 for a whole file
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.source}, line {self.line}" if self.line else self.source

    @property
    def is_json(self) -> bool:
        return self.source.endswith(JSON_SUFFIXES)


def check_inputs(paths: Iterable[str]) -> list[Path]:
    """The paths, each an existing file; `InputError` names one that is not."""
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise InputError(f"input {file} {what}: give .jsonl or plain text files")
    return files


def read_records(files: Iterable[Path], split_lines: bool = False) -> Iterator[Record]:
    """Every document's bytes, in the order of the files and of their lines."""
    for file in files:
        with open(file, "rb") as stream:
            if stream.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
                stream.seek(0)
            if not split_lines and file.suffix not in JSON_SUFFIXES:
                yield Record(str(file), 0, stream.read())
                continue
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield Record(str(file), number, line)


def parse_record(record: Record, keys: Iterable[str]) -> dict[str, str]:
    """The texts of a document by key; plain text has the one key `text`."""
    if record.is_json:
        fields = _parse_json(record)
    else:
        text = _decode(record)
        # Of a document that is a line, the line end belongs to the file.
        fields = {"text": text.rstrip("\r\n") if record.line else text}
    return {key: _text_of(fields, key, record) for key in keys}


def _decode(record: Record) -> str:
    try:
        return record.data.decode("utf-8")
    except UnicodeDecodeError as err:
        line = record.line or record.data.count(b"\n", 0, err.start) + 1
        raise InputError(f"{record.source}, line {line}: not UTF-8 text") from None


def _parse_json(record: Record) -> dict:
    try:
        fields = json.loads(_decode(record))
    except json.JSONDecodeError as err:
        raise InputError(
            f"{record.place}: invalid JSON ({err.msg} at column {err.colno}): "
            "expected one JSON object a line"
        ) from None
    if not isinstance(fields, dict):
        raise InputError(f"{record.place}: expected one JSON object a line")
    return fields


def _text_of(fields: dict, key: str, record: Record) -> str:
    if key not in fields:
        present = ", ".join(map(repr, list(fields)[:8])) or "none"
        raise InputError(f"{record.place}: no key {key!r} (its keys: {present}): see --json-keys")
    text = fields[key]
    if not isinstance(text, str):
        raise InputError(f"{record.place}: the value of {key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{record.place}: {key!r} holds half a surrogate pair, which is not text"
        ) from None
    return text
