"""Tokenizer files: as a HuggingFace model needs them beside its weights, and found there.

tokenizer.json                  HuggingFaceTokenizer
tokenizer.model                 SentencePieceTokenizer
vocab.json, merges.txt          GPT2BPETokenizer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.data.hugging_face import CONFIG, MODEL, GPT2BPETokenizer
from fp8lm.data.tokenizer import (
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from fp8lm.runtime.errors import InputError


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files, with settings that transformers reads its class from."""
    files = dict(tokenizer.files)
    kind = str(tokenizer.identity["tokenizer_type"])
    settings: dict[str, Any] | None = None
    if kind == "HuggingFaceTokenizer" and CONFIG not in files:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif kind == "GPT2BPETokenizer":
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    elif kind == "SentencePieceTokenizer":
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
    if settings is not None:
        files[CONFIG] = json.dumps({**settings, **_named(tokenizer)}, indent=2).encode() + b"\n"
    return files


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """Its control tokens' texts."""
    named = {"eos_token": tokenizer.eod, "bos_token": tokenizer.bos}
    found = {key: _piece(tokenizer, number) for key, number in named.items() if number is not None}
    if tokenizer.identity["tokenizer_type"] == "GPT2BPETokenizer":
        found["bos_token"] = found["unk_token"] = found["eos_token"]
    return found


def _piece(tokenizer: Tokenizer, number: int) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.piece(number)
    return tokenizer.detokenize([number])


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The control tokens' ids, as config.json and generation_config.json have them."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}


def find_tokenizer(
    folder: Path, rows: int, model: str | None = None, kind: str | None = None
) -> Tokenizer:
    """The tokenizer in `folder`, for a table of `rows`; or the one at `model`, of type `kind`.

    Without files there, ids that are their own text. `InputError` for one with more tokens than
    the table has rows.
    """
    tokenizer = _load(folder, rows, model, kind)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{model or folder}: the tokenizer has {tokenizer.vocab_size} tokens, and the model's "
            f"table {rows} rows: it is another model's"
        )
    return tokenizer


def _load(folder: Path, rows: int, model: str | None, kind: str | None) -> Tokenizer:
    if model is not None:
        return load_tokenizer(kind or _kind_of(Path(model)), model)
    if (folder / MODEL).is_file():
        return load_tokenizer("HuggingFaceTokenizer", str(folder))
    if (found := folder / SentencePieceTokenizer.MODEL).is_file():
        return load_tokenizer("SentencePieceTokenizer", str(found))
    if all((folder / name).is_file() for name in GPT2BPETokenizer.NAMES):
        return load_tokenizer("GPT2BPETokenizer", str(folder))
    return NullTokenizer(rows - 1)


def _kind_of(path: Path) -> str:
    if path.is_file():
        return "SentencePieceTokenizer" if path.suffix == ".model" else "HuggingFaceTokenizer"
    return "HuggingFaceTokenizer" if (path / MODEL).exists() else "GPT2BPETokenizer"


def config_section(tokenizer: Tokenizer, place: Path) -> Mapping[str, Any]:
    """Section `tokenizer` of a config, for files that lie in `place`."""
    kind = tokenizer.identity["tokenizer_type"]
    if not tokenizer.files:
        return {"tokenizer_type": kind, "vocab_size": tokenizer.vocab_size - 1}
    name = place if len(tokenizer.files) > 1 else place / next(iter(tokenizer.files))
    return {"tokenizer_type": kind, "tokenizer_model": str(name)}
