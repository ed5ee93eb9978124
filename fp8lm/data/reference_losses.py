"""The file of a reference model's log-probabilities, computed once: which model's, of which data.

safetensors, with a tensor for each split of `data.split`: -log p of every label (fp32), the
sequences of the examples one after the other. Its metadata are the reference model's identity and
a digest of each split's examples.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import InputError

KEY = "tuning.reference_logprobs"
TOOL = "make it with tools/reference_logprobs.py"
LARGEST_HEADER = 2**24  # bytes


@dataclass(frozen=True)
class ReferenceLosses:
    """`losses` and `digests` by the name of the split; `identity` of the model that they are of."""

    identity: Mapping[str, Any]
    digests: Mapping[str, str]
    losses: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: str) -> ReferenceLosses:
        """The file at `path`; `InputError` if there is none, or it is another kind of file."""
        metadata = read_metadata(path)
        try:
            losses = load(_read(path))
        except SafetensorError as error:
            raise InputError(f"{KEY} = {path} is damaged ({error}): {TOOL} again") from None
        return cls(metadata["reference"], metadata["examples"], losses)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        facts = {"reference": dict(self.identity), "examples": dict(self.digests)}
        metadata = {"fp8lm": json.dumps(facts, sort_keys=True)}
        write_aside(path, save(dict(self.losses), metadata))

    def of_split(self, path: str, split: str, digest: str) -> np.ndarray:
        """The losses of a split's examples; `InputError` if they are of other examples."""
        if self.digests.get(split) != digest:
            raise InputError(
                f"{KEY} = {path} was made of other examples for {split}: other data, tokenizer, "
                f"template, data.split or model.seq_length: {TOOL} again"
            )
        return self.losses[split]


def read_metadata(path: str) -> dict[str, Any]:
    """`reference` and `examples` of a file, without its tensors."""
    content = _read(path, 8)
    (size,) = struct.unpack("<Q", content.ljust(8, b"\0"))
    try:
        header = json.loads(_read(path, 8 + min(size, LARGEST_HEADER))[8:])
        facts = json.loads(header["__metadata__"]["fp8lm"])
        return {"reference": dict(facts["reference"]), "examples": dict(facts["examples"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{KEY} = {path} is no such file: {TOOL}") from None


def _read(path: str, count: int = -1) -> bytes:
    if not Path(path).is_file():
        raise InputError(f"{KEY} = {path} does not exist: {TOOL}")
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise InputError(f"{KEY} = {path} cannot be read: {error.strerror or error}") from None
