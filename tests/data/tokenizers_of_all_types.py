"""A small tokenizer of every type, made in a folder; no files of a hub are needed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

WORDS = ["def return lambda yield"] * 5


def train_bpe():
    """A byte-level BPE as GPT-2's, trained on a few words."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=["<|endoftext|>", "<stop>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def write_tiktoken(path, num_tokens=256):
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""}
        for i in range(num_tokens)
    ]
    path.write_text(json.dumps(vocabulary))
    return str(path)


def write_sentencepiece(path: Path) -> str:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=model,
        vocab_size=274,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        control_symbols=["<|stop|>"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def write_model(tokenizer_type: str, folder: Path) -> str | None:
    """The `tokenizer_model` of a small tokenizer of this type."""
    if tokenizer_type == "NullTokenizer":
        return None
    if tokenizer_type == "SentencePieceTokenizer":
        return write_sentencepiece(folder / "any name.model")
    if tokenizer_type == "TikTokenizer":
        return write_tiktoken(folder / "any name.json")
    bpe = train_bpe()
    if tokenizer_type == "GPT2BPETokenizer":
        bpe.model.save(str(folder))
    else:
        bpe.save(str(folder / "tokenizer.json"))
        write_config(folder, eos_token="<stop>", bos_token="<|endoftext|>")
    return str(folder)


def write_config(folder: Path, **settings) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
