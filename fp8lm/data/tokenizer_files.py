"""The local files that define a tokenizer, read once, so that they can travel with a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lm.runtime.errors import InputError

TEMPLATE = "chat_template.jinja"  # may lie beside a tokenizer of any type


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents by name; `source` says in messages where they came from."""

    source: str
    contents: dict[str, bytes]

    def json(self, name: str) -> Any:
        """The parsed JSON of a file; `InputError` if it is not JSON."""
        try:
            return json.loads(self.contents[name])
        except (ValueError, RecursionError):
            raise InputError(f"{name} of tokenizer {self.source} is not JSON") from None

    def json_object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, empty where there is no such file."""
        if name not in self.contents:
            return {}
        value = self.json(name)
        if not isinstance(value, dict):
            raise InputError(f"{name} of tokenizer {self.source} is not a JSON object")
        return value


def read_folder(folder: Path, required: Iterable[str], optional: Iterable[str]) -> TokenizerFiles:
    """The named files of a folder; `InputError` for a missing or unreadable one."""
    contents = {}
    for name in required:
        if not (folder / name).exists():
            raise InputError(f"tokenizer_model {folder} holds no {name}{other_type(folder)}")
        contents[name] = read_file(folder / name)
    for name in optional:
        if os.path.lexists(folder / name):  # a link to nowhere, too: it stands for something
            contents[name] = read_file(folder / name)
    return TokenizerFiles(str(folder), contents)


def read_model(path: Path, name: str) -> TokenizerFiles:
    """The model file `path` under `name`, and the chat template beside it, if there is one."""
    beside = read_folder(path.parent, (), (TEMPLATE,)) if path.is_file() else None
    return TokenizerFiles(str(path), {name: read_file(path), **(beside.contents if beside else {})})


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; `InputError` where there are none to read."""
    if path.is_dir():
        raise InputError(f"tokenizer_model {path} is a folder: give a file{other_type(path)}")
    if not path.is_file():
        raise InputError(f"tokenizer_model {path} is not a regular file")
    try:
        return path.read_bytes()
    except OSError as err:
        raise InputError(f"tokenizer_model {path} cannot be read: {err.strerror or err}") from None


def type_of_file(source: str, used: str) -> str:
    """A hint when the name of a file is that of another type's than the one `used`."""
    kinds = {".model": "SentencePieceTokenizer", ".json": "HuggingFaceTokenizer"}
    kind = kinds.get(Path(source).suffix)
    return "" if kind in (None, used) else f": use {kind} for this file"


def other_type(path: Path) -> str:
    """A hint when the folder looks like another tokenizer's."""
    if (path / "tokenizer.json").exists():
        return ": use HuggingFaceTokenizer for this folder"
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return ": use GPT2BPETokenizer for this folder"
    if models := sorted(path.glob("*.model")):
        return f": use SentencePieceTokenizer with {models[0]}"
    return ""
