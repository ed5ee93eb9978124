"""Tokenizers under Megatron's type names, loaded from local files only.

Each class carries `identity`, which preprocessing writes beside the data: a run whose tokenizer
differs from the one that made the data is told so instead of training on the wrong ids. And it
carries `files`, so that they can be kept elsewhere and loaded with `tokenizer_from_files`.

Of the text `</s>` or `<|endoftext|>` inside a document all make ordinary tokens, so that no text
can end a document; with `parse_special_tokens` all make the control token of that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sentencepiece

from fp8lm.data.hugging_face import GPT2BPETokenizer, HuggingFaceTokenizer
from fp8lm.data.identity import Identity, identify
from fp8lm.data.tiktoken_vocabulary import TikTokenizer
from fp8lm.data.tokenizer_files import TokenizerFiles, read_model, type_of_file
from fp8lm.runtime.errors import InputError

if TYPE_CHECKING:
    from fp8lm.config import TokenizerConfig


class Tokenizer(Protocol):
    """Text to token ids and back.

    `eod` is the id written after each document, `bos` one that may be written before it, if the
    tokenizer has one. `files` are the contents by name of the local files that define it.
    """

    vocab_size: int
    eod: int
    files: dict[str, bytes]

    @property
    def bos(self) -> int | None: ...

    @property
    def identity(self) -> Identity: ...

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...

    def id_to_token(self, token: int) -> str:
        """The text that `parse_special_tokens` makes this token of, if it is a control token."""
        ...


class FileTokenizer(Tokenizer, Protocol):
    """A tokenizer that local files define."""

    def __init__(self, files: TokenizerFiles) -> None: ...

    @staticmethod
    def read(path: Path) -> TokenizerFiles:
        """What defines it, from a file or folder."""
        ...


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
    kind = TOKENIZERS[tokenizer_type]
    return kind(kind.read(path))


def tokenizer_from_files(
    tokenizer_type: str,
    files: Mapping[str, bytes],
    vocab_size: int | None = None,
    source: str = "from files",
) -> Tokenizer:
    """Build a tokenizer from what another one has as `files`; `source` stands in messages."""
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(vocab_size, files)
    try:
        return TOKENIZERS[tokenizer_type](TokenizerFiles(source, dict(files)))
    except KeyError as err:
        raise InputError(f"tokenizer {source}: {err} is missing for {tokenizer_type}") from None


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

    def __init__(self, vocab_size: int | None, files: Mapping[str, bytes] | None = None) -> None:
        if not vocab_size or vocab_size < 1:
            raise InputError(
                f"NullTokenizer needs vocab_size, a positive number of ids, not {vocab_size}"
            )
        self.vocab_size = vocab_size + 1
        self.eod, self.bos = vocab_size, None
        self.files = dict(files or {})  # of no use to it, but kept with checkpoints
        self.identity = identify("NullTokenizer", self.vocab_size, self.eod)

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as err:
            raise InputError(
                f"NullTokenizer reads whitespace-separated integers: {str(err)[:100]}"
            ) from None
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"NullTokenizer: id {str(token)[:20]} is outside 0 .. {self.vocab_size - 1}: "
                    "raise vocab_size"
                )
        return ids

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def id_to_token(self, token: int) -> str:
        return str(token)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; `eod` is its end-of-sentence piece."""

    MODEL = "tokenizer.model"

    def __init__(self, files: TokenizerFiles) -> None:
        self.files, model = files.contents, files.contents[self.MODEL]
        try:
            if not model:
                raise RuntimeError("an empty file, which the library takes and then cannot use")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):
            hint = type_of_file(files.source, "SentencePieceTokenizer")
            raise InputError(
                f"tokenizer_model {files.source} is not a SentencePiece model{hint}"
            ) from None
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise InputError(
                f"tokenizer_model {files.source} has no end-of-sentence piece, which marks the end "
                "of a document: train it with one (tools/train_tokenizer.py does)"
            )
        bos = self._processor.bos_id()
        self.bos = None if bos < 0 else bos

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """The one file, and the chat template beside it, if there is one."""
        return read_model(path, cls.MODEL)

    @cached_property
    def identity(self) -> Identity:
        """Digest of the model."""
        content = [self.files[self.MODEL]]
        return identify("SentencePieceTokenizer", self.vocab_size, self.eod, content)

    @cached_property
    def _control_pieces(self) -> dict[str, int]:
        """Ids of the control pieces, which the library never finds in text."""
        numbers = filter(self._processor.is_control, range(self.vocab_size))
        return {self._processor.id_to_piece(number): number for number in numbers}

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        if not parse_special_tokens or not self._control_pieces:
            return self._processor.encode(text)
        longest_first = sorted(self._control_pieces, key=len, reverse=True)
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if part in self._control_pieces:
                ids.append(self._control_pieces[part])
            else:
                ids += self._processor.encode(part)
        return ids

    def detokenize(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def id_to_token(self, token: int) -> str:
        return self._processor.id_to_piece(token)


TOKENIZERS: dict[str, type[FileTokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "TikTokenizer": TikTokenizer,
}
TOKENIZER_TYPES = (*TOKENIZERS, "NullTokenizer")
