"""The identity of a tokenizer, recorded beside data and in checkpoints.

An identity is a flat dict. `model_sha256` is the digest of the model files' bytes.
`encoding_sha256`, where a tokenizer has one, is the digest of their meaning: what turns text into
ids, whatever the files' layout; two identities that both have it are compared by it. Fields that
one side lacks, because an earlier version wrote it, are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

Identity = dict[str, str | int | None]

NAMES = {
    "tokenizer_type": "the tokenizer's type",
    "vocab_size": "the size of the vocabulary",
    "eod": "the end-of-document id",
    "encoding_sha256": "how text becomes ids",
    "model_sha256": "the model file",
}


def identify(
    tokenizer_type: str,
    vocab_size: int,
    eod: int,
    model_files: Iterable[bytes] = (),
    encoding: Any = None,
) -> Identity:
    """The identity of a tokenizer.

    `model_files` are the contents of its model's files, `encoding` a JSON value that determines
    what ids a text becomes.
    """
    model = b"".join(model_files)
    identity: Identity = {
        "tokenizer_type": tokenizer_type,
        "vocab_size": vocab_size,
        "eod": eod,
        "model_sha256": hashlib.sha256(model).hexdigest() if model else None,
    }
    if encoding is not None:
        canonical = json.dumps(encoding, sort_keys=True, separators=(",", ":"))
        identity["encoding_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    return identity


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between a recorded identity and the present one, in words; empty if nothing."""

    def both_have(name: str) -> bool:
        return recorded.get(name) is not None and current.get(name) is not None

    names = list(NAMES)
    if both_have("encoding_sha256"):
        names.remove("model_sha256")
    return [NAMES[n] for n in names if both_have(n) and recorded[n] != current[n]]


def describe(identity: Mapping[str, Any]) -> str:
    """An identity in a few words, for messages."""
    details = [f"vocabulary {identity.get('vocab_size')}"]
    if identity.get("eod") is not None:
        details.append(f"end of document {identity['eod']}")
    if digest := identity.get("model_sha256"):
        details.append(f"model sha256 {str(digest)[:12]}")
    return f"{identity.get('tokenizer_type')} ({', '.join(details)})"
