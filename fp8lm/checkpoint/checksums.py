"""SHA-256 of every file of a checkpoint, taken while it is written and checked before it is used.

They lie in `checksums.sha256`, in the format of sha256sum: `sha256sum -c checksums.sha256` in the
checkpoint's folder checks them without this program.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

CHECKSUMS = "checksums.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def checksums_text(digests: Mapping[str, str]) -> str:
    """The content of the file for hex digests by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def parse_checksums(text: str) -> dict[str, str]:
    """Hex digests by file name; ValueError for what `checksums_text` would not write."""
    lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    if not lines or None in lines or not text.endswith("\n"):
        raise ValueError("expected lines of a SHA-256 and a file name")
    return {line[2]: line[1] for line in lines}


def file_digest(path: Path) -> str:
    """SHA-256 of the file at `path`, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of `text` in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
