"""Tokenizer files: as a HuggingFace model needs them beside its weights, and found there.

tokenizer.json                  HuggingFaceTokenizer
tokenizer.model                 SentencePieceTokenizer
vocab.json, merges.txt          GPT2BPETokenizer
chat_template.jinja             with any of them
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
from fp8lm.data.tokenizer_files import TEMPLATE
from fp8lm.runtime.errors import InputError


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files, with settings that transformers reads its class from."""
    files = dict(tokenizer.files)
    if CONFIG not in files and (settings := _settings(tokenizer)):
        files[CONFIG] = json.dumps(settings, indent=2).encode() + b"\n"
    return files


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    named = {"eos_token": tokenizer.eod, "bos_token": tokenizer.bos}
    texts = {
        key: tokenizer.detokenize([number]) for key, number in named.items() if number is not None
    }
    match kind_of(tokenizer):
        case "HuggingFaceTokenizer":
            return {"tokenizer_class": "PreTrainedTokenizerFast", **texts}
        case "GPT2BPETokenizer":
            end = texts["eos_token"]
            names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
            return {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **names}
        case "SentencePieceTokenizer":
            return _sentencepiece_settings(tokenizer)
    return {}


def _sentencepiece_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    model = _sentencepiece_model(tokenizer)
    ids = {"unk_token": model.trainer_spec.unk_id, "eos_token": tokenizer.eod}
    if tokenizer.bos is not None:
        ids["bos_token"] = tokenizer.bos
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_prefix_space": model.normalizer_spec.add_dummy_prefix,
        "legacy": False,
        **{key: model.pieces[number].piece for key, number in ids.items()},
    }


def _sentencepiece_model(tokenizer: Tokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    models: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    return models.ModelProto.FromString(tokenizer.files[SentencePieceTokenizer.MODEL])


def kind_of(tokenizer: Tokenizer) -> str:
    """Megatron's name of its type."""
    return str(tokenizer.identity["tokenizer_type"])


def reservations(tokenizer: Tokenizer) -> list[str]:
    """What transformers will not do with the files as this program does."""
    kind = kind_of(tokenizer)
    if kind == "SentencePieceTokenizer":
        model = _sentencepiece_model(tokenizer)
        is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
        if not is_bpe or model.normalizer_spec.name != "identity":
            return [
                "warning: transformers reads a SentencePiece model as BPE without normalization, "
                "which this one is not: it may split some text otherwise"
            ]
    if kind == "TikTokenizer":
        return ["warning: transformers does not read this tokenizer's file: serve token ids"]
    return [] if kind != "NullTokenizer" else ["no tokenizer: the model takes token ids alone"]


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
    kind = kind_of(tokenizer)
    if isinstance(tokenizer, NullTokenizer):
        return {"tokenizer_type": kind, "vocab_size": tokenizer.vocab_size - 1}
    files = [name for name in tokenizer.files if name != TEMPLATE]
    name = place if len(files) > 1 else place / files[0]
    return {"tokenizer_type": kind, "tokenizer_model": str(name)}
