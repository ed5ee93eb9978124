"""Tokenizers made elsewhere, in the file formats in which people share them."""

from __future__ import annotations

import json
from pathlib import Path

from fp8lm.data.files import identify
from fp8lm.errors import InputError


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
        self.identity = identify("HuggingFaceTokenizer", self.vocab_size, [file])

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
        self.identity = identify("GPT2BPETokenizer", self.vocab_size, files)

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
        from fp8lm.quiet import quiet_megatron

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
        self.identity = identify("TikTokenizer", self.vocab_size, [path])

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.text_to_ids(text)

    def detokenize(self, ids: list[int]) -> str:
        # Not ids_to_text: it decodes token by token, which breaks characters of several tokens.
        return self._tokenizer.tokenizer.decode(ids)


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
