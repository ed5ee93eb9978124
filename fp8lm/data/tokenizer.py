"""Tokenizers under Megatron's type names, loaded from local files only.

Each class carries `identity`, which preprocessing writes beside the data: a run whose tokenizer
differs from the one that made the data is told so instead of training on the wrong ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sentencepiece

from fp8lm.data.files import sha256_of
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
        self.identity = _identity("NullTokenizer", self.vocab_size, None)

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
        self.identity = _identity("SentencePieceTokenizer", self.vocab_size, sha256_of([path]))

    def tokenize(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, or the folder that holds one, read by the `tokenizers` package.

    `eod` is the end-of-sequence token that the files beside it name, else a well-known one.
    """

    USUAL_EOD = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise InputError(f"tokenizer_model {path} holds no tokenizer.json{_other_type(path)}")
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as err:  # the package raises plain Exception
            raise InputError(f"tokenizer_model {file} cannot be read: {err}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have holes: what the embedding needs is the largest id, not the count.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eod = self._find_eod(file.parent)
        self.identity = _identity("HuggingFaceTokenizer", self.vocab_size, sha256_of([file]))

    def _find_eod(self, folder: Path) -> int:
        named = _named_eos(folder)
        for token in [named] if named else self.USUAL_EOD:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is not None:
                return token_id
        raise InputError(
            f"the tokenizer in {folder} has no end-of-document token: name one of its tokens as "
            'eos_token in tokenizer_config.json, e.g. {"eos_token": "</s>"}'
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from a folder with `vocab.json` and `merges.txt`; `eod` is
    `<|endoftext|>`, which is not recognised inside text."""

    EOD = "<|endoftext|>"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        files = [path / "vocab.json", path / "merges.txt"]
        for file in files:
            if not file.exists():
                raise InputError(f"tokenizer_model {path} holds no {file.name}{_other_type(path)}")
        try:
            model = models.BPE.from_file(*map(str, files))
        except Exception as err:  # the package raises plain Exception
            raise InputError(f"tokenizer_model {path} cannot be read: {err}") from None
        self._tokenizer = FastTokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        eod = self._tokenizer.token_to_id(self.EOD)
        if eod is None:
            raise InputError(f"{files[0]} has no {self.EOD}, which marks the end of a document")
        self.eod = eod
        self.identity = _identity("GPT2BPETokenizer", self.vocab_size, sha256_of(files))

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class TikTokenizer:
    """Megatron's tiktoken vocabulary: a JSON list of {rank, token_bytes, token_str}.

    The ids are megatron-core's: 1000 special tokens first, pattern v2, at most 2**17 in all.
    """

    NUM_SPECIAL, MAX_VOCAB = 1000, 2**17

    def __init__(self, path: Path) -> None:
        try:
            import tiktoken  # noqa: F401
        except ImportError:
            raise InputError("TikTokenizer needs tiktoken: pip install tiktoken") from None
        from fp8lm.data.quiet import quiet_megatron

        with quiet_megatron():
            from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer
        try:
            size = len(json.loads(path.read_bytes())) + self.NUM_SPECIAL
            self._tokenizer = TikTokenTokenizer(str(path), vocab_size=min(size, self.MAX_VOCAB))
        except (AssertionError, AttributeError, OSError, TypeError, KeyError, ValueError):
            raise InputError(
                f"tokenizer_model {path} is not a tiktoken vocabulary: expected a .json list of "
                "{rank, token_bytes, token_str}"
            ) from None
        self.vocab_size = self._tokenizer.vocab_size
        self.eod = self._tokenizer.eod
        self.identity = _identity("TikTokenizer", self.vocab_size, sha256_of([path]))

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.text_to_ids(text)

    def detokenize(self, ids: list[int]) -> str:
        # Not ids_to_text: it decodes token by token, which breaks characters of several tokens.
        return self._tokenizer.tokenizer.decode(ids)


TOKENIZERS = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "TikTokenizer": TikTokenizer,
}
TOKENIZER_TYPES = (*TOKENIZERS, "NullTokenizer")


def _identity(
    tokenizer_type: str, vocab_size: int, digest: str | None
) -> dict[str, str | int | None]:
    return {"tokenizer_type": tokenizer_type, "vocab_size": vocab_size, "model_sha256": digest}


def _named_eos(folder: Path) -> str | None:
    """The end-of-sequence token that a Hugging Face folder's settings name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_bytes()).get("eos_token")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            raise InputError(f"{folder / name} is not a JSON object") from None
        if token:
            return token["content"] if isinstance(token, dict) else token
    return None


def _other_type(path: Path) -> str:
    """A hint when the folder looks like another tokenizer's."""
    if (path / "tokenizer.json").exists():
        return ": use HuggingFaceTokenizer for this folder"
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return ": use GPT2BPETokenizer for this folder"
    if models := sorted(path.glob("*.model")):
        return f": use SentencePieceTokenizer with {models[0]}"
    return ""
