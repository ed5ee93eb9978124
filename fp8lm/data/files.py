"""Small things about files: digests, and writing aside before taking the name."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8lm.errors import InputError
from fp8lm.runtime.files import write_whole


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def identify(
    tokenizer_type: str, vocab_size: int, files: Iterable[Path] = ()
) -> dict[str, str | int | None]:
    """What tells one tokenizer from another: its type, its size, the digest of its files."""
    digest = sha256_of(files) if files else None
    return {
        "tokenizer_type": tokenizer_type,
        "vocab_size": vocab_size,
        "model_sha256": digest,
    }


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A temporary folder on `target`'s file system, removed on leaving the block.

    Write into it, then `os.replace` the finished files to their names: a failure or an interrupt
    leaves nothing. Creates `target`'s parent; raises `InputError` where it cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as err:
        raise InputError(f"cannot write to {target.parent}: {err.strerror or err}") from None
    with aside as name:
        yield Path(name)


def write_aside(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write what a user has named as output: at once, and whole or not at all.

    Creates its folder; raises `InputError` where it cannot be written. A device or a pipe, such as
    /dev/stdout, is written to as it is.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"cannot write to {path.parent}: {err.strerror or err}") from None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
        else:
            write_whole(path, data)
    except OSError as err:
        raise InputError(f"cannot write {path}: {err.strerror or err}") from None
