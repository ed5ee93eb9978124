"""Whether the files of a checkpoint are those that were written."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

import fp8lm
from fp8lm.checkpoint.checksums import CHECKSUMS, file_digest, parse_checksums
from fp8lm.checkpoint.files import COMMON
from fp8lm.checkpoint.metadata import METADATA, DamagedCheckpoint, read_metadata
from fp8lm.checkpoint.saving import FORMAT_VERSION
from fp8lm.errors import InputError


def inspect_folder(folder: Path) -> tuple[dict[str, Any], Metadata, dict[str, str]]:
    """What `folder` says of itself: common facts, where the tensors are, SHA-256 by file.

    No tensor is read. `DamagedCheckpoint` if something is missing, too short or makes no sense,
    `InputError` if it is of a newer program or may not be read.
    """
    common, metadata = read_common(folder), read_metadata(folder)
    digests = _read_checksums(folder)
    _check_sizes(folder, metadata, digests)
    return common, metadata, digests


def read_common(folder: Path) -> dict[str, Any]:
    """What was saved as `meta`; `DamagedCheckpoint`, or `InputError` if it cannot be read."""
    path = folder / COMMON
    try:
        common = json.loads(path.read_text())
        version = common["format_version"]
        newer = version > FORMAT_VERSION
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} is incomplete: no {COMMON}") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error!r}") from error
    if newer:
        raise InputError(
            f"{folder} has format version {version}, written by fp8lm "
            f"{common.get('fp8lm_version')}; this is fp8lm {fp8lm.__version__}, which reads up to "
            f"{FORMAT_VERSION}: upgrade it"
        )
    return common


def check_files(folder: Path, digests: dict[str, str], names: list[str]) -> list[str]:
    """What is wrong with the files `names` of `folder`, whose SHA-256 should be `digests`."""
    problems = []
    for name in names:
        path = folder / name
        try:
            if file_digest(path) != digests[name]:
                problems.append(
                    f"{path} is damaged: its SHA-256 differs from the one in {CHECKSUMS}"
                )
        except FileNotFoundError:
            problems.append(f"{folder} is incomplete: no {name}")
        except PermissionError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        except OSError as error:
            problems.append(f"{path} is unreadable: {error}")
    return problems


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    try:
        digests = parse_checksums(path.read_text())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} is incomplete: no {CHECKSUMS}") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    if missing := {COMMON, METADATA} - set(digests):
        raise DamagedCheckpoint(f"{path} is damaged: it does not name {', '.join(missing)}")
    return digests


def _check_sizes(folder: Path, metadata: Metadata, digests: dict[str, str]) -> None:
    """Raise for a file that `metadata` speaks of and is missing, too short or without a digest."""
    ends: dict[str, int] = defaultdict(int)
    for where in metadata.storage_data.values():
        ends[where.relative_path] = max(ends[where.relative_path], where.offset + where.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{folder} is incomplete: no {name}")
        if (size := path.stat().st_size) < end:
            raise DamagedCheckpoint(f"{path} is truncated: {size} bytes, expected {end}")
        if name not in digests:
            raise DamagedCheckpoint(f"{folder / CHECKSUMS} is damaged: it does not name {name}")
