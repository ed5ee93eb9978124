"""Tokenizers under Megatron's type names, loaded from local files only.

Each class carries `identity`, which preprocessing writes beside the data: a run whose tokenizer
differs from the one that made the data is told so instead of training on the wrong ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sentencepiece

from fp8lm.data.files import identify
from fp8lm.data.shared_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer, TikTokenizer
from fp8lm.errors import InputError

if TYPE_CHECKING:
    from fp8lm.config import TokenizerConfig


class Tokenizer(Protocol):
    """Text to token ids and back; `eod` is the id written after each document."""

    vocab_size: int
    eod: int
    identity: dict[str, str | int | None]

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer of the config's `tokenizer` section."""
    return load_tokenizer(config.tokenizer_type, config.tokenizer_model, config.vocab_size)


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None
) -> Tokenizer:
    """Build a tokenizer by Megatron's type name from a local file or folder.

    `vocab_size` is used by NullTokenizer only. Raises `InputError` for an unknown type, a missing
    or unreadable model, and a vocabulary without an end-of-document token.
    """
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    if tokenizer_type not in TOKENIZERS:
        raise InputError(
            f"tokenizer_type {tokenizer_type!r} is unknown: use one of {', '.join(TOKENIZER_TYPES)}"
        )
    if not tokenizer_model:
        raise InputError(
            f"tokenizer_model is not set, and {tokenizer_type} needs one: give a local path"
        )
    path = Path(tokenizer_model)
    if not path.exists():
        raise InputError(
            f"tokenizer_model {tokenizer_model} does not exist: give a local file or folder "
            "(names on a hub are not downloaded)"
        )
    return TOKENIZERS[tokenizer_type](path)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up so that every tensor-parallel rank's share
    is a multiple of `divisible_by`."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


class NullTokenizer:
    """Text that already is ids, separated by whitespace: for speed tests and mock data.

    Megatron's meaning of `vocab_size`: ids 0 .. vocab_size - 1 plus one more, the end of document,
    so `self.vocab_size` is one larger than what was asked for and `eod` is its last id.
    """

    def __init__(self, vocab_size: int | None) -> None:
        if not vocab_size or vocab_size < 1:
            raise InputError(
                f"NullTokenizer needs vocab_size, a positive number of ids, not {vocab_size}"
            )
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size
        self.identity = identify("NullTokenizer", self.vocab_size)

    def tokenize(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as err:
            raise InputError(f"NullTokenizer reads whitespace-separated integers: {err}") from None
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"NullTokenizer: id {token} is outside 0 .. {self.vocab_size - 1}: "
                    "raise vocab_size"
                )
        return ids

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; `eod` is its end-of-sentence piece."""

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise InputError(f"tokenizer_model {path} is not a SentencePiece model") from None
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise InputError(
                f"tokenizer_model {path} has no end-of-sentence piece, which marks the end of a "
                "document: train it with one (tools/train_tokenizer.py does)"
            )
        self.identity = identify("SentencePieceTokenizer", self.vocab_size, [path])

    def tokenize(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


TOKENIZERS = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "TikTokenizer": TikTokenizer,
}
TOKENIZER_TYPES = (*TOKENIZERS, "NullTokenizer")
