"""Verifies that the files of a checkpoint are those that were written.

What a checkpoint says is believed only after its SHA-256: the files of facts are read once, hashed,
and then parsed from the same bytes.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from fp8lm.checkpoint.checksums import (
    CHECKSUMS,
    LARGEST_CHECKSUMS,
    data_digest,
    file_digest,
    parse_checksums,
)
from fp8lm.checkpoint.facts import LARGEST_COMMON, parse_common
from fp8lm.checkpoint.files import COMMON
from fp8lm.checkpoint.metadata import (
    LARGEST_METADATA,
    METADATA,
    DamagedCheckpoint,
    parse_metadata,
)
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import read_regular

LARGEST_OTHER = 2**30  # bytes of a file that holds no tensor


@dataclass(frozen=True)
class Contents:
    """Facts and metadata of a checkpoint folder, and expected SHA-256 of files not yet hashed."""

    common: dict[str, Any]
    metadata: Metadata
    unchecked: dict[str, str]

    @property
    def files(self) -> frozenset[str]:
        """Names of the files that hold neither facts nor tensors."""
        places = self.metadata.storage_data.values()
        return frozenset(self.unchecked) - {where.relative_path for where in places}


def inspect_folder(folder: Path, needed: Collection[str] = ()) -> Contents:
    """Facts and metadata of `folder`; the keys `needed` must be among its facts.

    No tensor is read. `DamagedCheckpoint` if something is missing, too short or makes no sense,
    `InputError` if it is of a newer program or may not be read.
    """
    digests = _read_checksums(folder)
    common = _read_common(folder, digests[COMMON], needed)
    metadata = read_metadata(folder, digests[METADATA])
    _check_sizes(folder, metadata, digests)
    facts = (COMMON, METADATA)
    unchecked = {name: digest for name, digest in digests.items() if name not in facts}
    return Contents(common, metadata, unchecked)


def read_metadata(folder: Path, digest: str | None = None) -> Metadata:
    """Where the tensors of `folder` are; `digest` is the SHA-256 that .metadata should have."""
    data = _read(folder, METADATA, LARGEST_METADATA, digest)
    try:
        return parse_metadata(data)
    except InputError as error:
        raise DamagedCheckpoint(f"{folder / METADATA}: {error}") from None
    except Exception as error:  # a crafted pickle can fail in any way
        raise DamagedCheckpoint(f"{folder / METADATA} is damaged: {_brief(error)}") from error


def check_files(folder: Path, digests: dict[str, str], names: list[str]) -> list[str]:
    """What is wrong with the files `names` of `folder`, whose SHA-256 should be `digests`."""
    problems = []
    for name in names:
        path = folder / name
        try:
            if file_digest(path) != digests[name]:
                problems.append(_differs(path))
        except FileNotFoundError:
            problems.append(f"{folder} is incomplete: no {name}")
        except PermissionError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        except OSError as error:
            problems.append(f"{path} is unreadable: {error.strerror}")
    return problems


def _read_common(folder: Path, digest: str, needed: Collection[str]) -> dict[str, Any]:
    data = _read(folder, COMMON, LARGEST_COMMON, digest)
    try:
        return parse_common(data, needed)
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder / COMMON} is damaged: {_brief(error)}") from error
    except InputError as error:
        raise InputError(f"{folder} {error}") from error


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    try:
        digests = parse_checksums(_read(folder, CHECKSUMS, LARGEST_CHECKSUMS))
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged: {_brief(error)}") from error
    if missing := sorted({COMMON, METADATA} - set(digests)):
        raise DamagedCheckpoint(f"{path} is damaged: it does not name {', '.join(missing)}")
    return digests


def _read(folder: Path, name: str, most: int, digest: str | None = None) -> bytes:
    """A small file of `folder`, whose SHA-256 should be `digest`."""
    path = folder / name
    try:
        data = read_regular(path, most)
    except FileNotFoundError:
        hint = ""
        if _is_megatrons(folder):
            hint = " (Megatron-LM's look so: tools/convert_checkpoint.py --from megatron)"
        raise DamagedCheckpoint(f"{folder} is incomplete: no {name}{hint}") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error.strerror}") from error
    if digest is not None and data_digest(data) != digest:
        raise DamagedCheckpoint(_differs(path))
    return data


def _check_sizes(folder: Path, metadata: Metadata, digests: dict[str, str]) -> None:
    """Raise for a file that is missing, not regular, without a digest, or not of the right size."""
    ends: dict[str, int] = defaultdict(int)
    for where in metadata.storage_data.values():
        ends[where.relative_path] = max(ends[where.relative_path], where.offset + where.length)
    if unnamed := sorted(ends.keys() - digests.keys()):
        raise DamagedCheckpoint(f"{folder / CHECKSUMS} is damaged: it does not name {unnamed[0]}")
    for name in digests:
        size, end = _size(folder, name), ends.get(name)
        if end is None and size > LARGEST_OTHER:
            raise DamagedCheckpoint(f"{folder / name} holds no tensor, and {size:,} bytes")
        if end is not None and size < end:
            raise DamagedCheckpoint(f"{folder / name} is truncated: {size} bytes, expected {end}")
        if end is not None and size > end:
            raise DamagedCheckpoint(f"{folder / name} is damaged: {size} bytes, expected {end}")


def _is_megatrons(folder: Path) -> bool:
    """Whether it holds a file or a folder that only Megatron-LM's checkpoints have."""
    signs = ("mp_rank_*", "common.pt", "metadata.json")
    return any(next(folder.glob(sign), None) is not None for sign in signs)


def _size(folder: Path, name: str) -> int:
    try:
        found = os.lstat(folder / name)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} is incomplete: no {name}") from None
    except PermissionError as error:
        raise InputError(f"{folder / name} cannot be read: {error}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{folder / name} is unreadable: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{folder / name} is damaged: it is no regular file")
    return found.st_size


def _differs(path: Path) -> str:
    return f"{path} is damaged: its SHA-256 differs from the one in {CHECKSUMS}"


def _brief(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text[:200]}" if not isinstance(error, ValueError) else text
