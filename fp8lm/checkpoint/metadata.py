"""Reading a checkpoint's `.metadata` without running anything it says.

torch.distributed.checkpoint stores its metadata pickled, and a pickle can call any function. The
unpickler here knows only the plain data classes such a file consists of and refuses every other
name before it is imported.
"""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from fp8lm.errors import InputError

METADATA = ".metadata"


class DamagedCheckpoint(InputError):
    """A checkpoint that is incomplete or not what was written: an older one may serve."""


_CLASSES = (
    *(
        (metadata.__name__, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
)


def read_metadata(folder: Path) -> Metadata:
    """Read `folder`/.metadata; `InputError` if it cannot be read.

    `DamagedCheckpoint` if it is missing, damaged or names anything foreign.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        _check(found)
    except InputError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} is incomplete: no {METADATA}") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise DamagedCheckpoint(f"{path} is damaged: {error!r}") from error
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):  # how Python before 3.11.4 pickles an enum
            return _enum_member
        raise InputError(f"refused to load {module}.{name}, which no checkpoint contains")


def _enum_member(kind: type[enum.Enum], name: str) -> enum.Enum:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise InputError(f"refused to read the attribute {name!r} of {kind!r}")
    return kind[name]


def _check(found: Any) -> None:
    """Raise unless every part has the type that the rest of the code relies on."""
    if not isinstance(found, Metadata):
        raise TypeError(f"expected Metadata, found {type(found).__name__}")
    for name, stored in found.state_dict_metadata.items():
        chunks_are_blocks = isinstance(stored, TensorStorageMetadata) and all(
            isinstance(chunk, ChunkStorageMetadata) for chunk in stored.chunks
        )
        if not (chunks_are_blocks and isinstance(stored.properties.dtype, torch.dtype)):
            raise TypeError(f"{name} is not a tensor")
    for index, where in found.storage_data.items():
        # A bare name: the file lies in the checkpoint's own folder.
        if not isinstance(index, MetadataIndex) or Path(where.relative_path).name != (
            where.relative_path
        ):
            raise ValueError(f"{index} is stored at {where}")
