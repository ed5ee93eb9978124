"""SHA-256 of every file of a checkpoint, taken while it is written and checked before it is used.

They are stored in `checksums.sha256`, in the format of sha256sum: `sha256sum -c checksums.sha256`
in the checkpoint's folder checks them without this program.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from fp8lm.runtime.files import open_regular

CHECKSUMS = "checksums.sha256"
LARGEST_CHECKSUMS = 2**24  # bytes: those of some hundred thousand files
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]{1,255})")
_BLOCK = 2**20


def checksums_text(digests: Mapping[str, str]) -> str:
    """The content of the file for hex digests by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def parse_checksums(data: bytes) -> dict[str, str]:
    """Hex digests by file name; ValueError for what `checksums_text` would not write."""
    text = data.decode()
    given = text.split("\n")[:-1]
    lines = [match for match in map(_LINE.fullmatch, given) if match is not None]
    if not lines or len(lines) < len(given) or not text.endswith("\n"):
        raise ValueError("expected lines of a SHA-256 and a file name")
    digests = {line[2]: line[1] for line in lines}
    for name in digests:
        if name in (".", "..", CHECKSUMS) or not name.isprintable():
            raise ValueError(f"{name!r} is no name of a file that it could speak of")
    if len(digests) < len(lines):
        raise ValueError("it names a file twice")
    return digests


def file_digest(path: Path) -> str:
    """SHA-256 of the regular file at `path`, in hex; no more of it than there is at the start."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def data_digest(data: bytes | str) -> str:
    """SHA-256 of `data` (text in UTF-8), in hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
