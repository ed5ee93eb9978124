"""Megatron's tiktoken vocabularies."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

from fp8lm.data.identity import Identity, identify
from fp8lm.data.tokenizer_files import TokenizerFiles, read_model
from fp8lm.runtime.errors import InputError


class TikTokenizer:
    """Megatron's tiktoken vocabulary: a JSON list of {rank, token_bytes, token_str}.

    The ids are megatron-core's: 1000 special tokens first, pattern v2, at most 2**17 in all. `bos`
    is its `<s>` and `eod` its `</s>`.
    """

    NUM_SPECIAL, MAX_VOCAB = 1000, 2**17
    MODEL = "vocab.json"

    def __init__(self, files: TokenizerFiles) -> None:
        try:
            import tiktoken  # noqa: F401
        except ImportError:
            raise InputError("TikTokenizer needs tiktoken: pip install tiktoken") from None
        from fp8lm.runtime.quiet import quiet_megatron

        with quiet_megatron():
            from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer
        self._files, self.files = files, files.contents
        try:
            size = len(files.json(self.MODEL)) + self.NUM_SPECIAL
            with tempfile.NamedTemporaryFile(suffix=".json") as file:  # it reads from a path only
                file.write(files.contents[self.MODEL])
                file.flush()
                tokenizer = TikTokenTokenizer(file.name, vocab_size=min(size, self.MAX_VOCAB))
        except (AssertionError, AttributeError, InputError, TypeError, KeyError, ValueError):
            raise InputError(
                f"tokenizer_model {files.source} is not a tiktoken vocabulary: expected a .json "
                "list of {rank, token_bytes, token_str}"
            ) from None
        self._encoding = tokenizer.tokenizer
        self.vocab_size, self.eod, self.bos = tokenizer.vocab_size, tokenizer.eod, tokenizer.bos_id

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """The one file, and the chat template beside it, if there is one."""
        return read_model(path, cls.MODEL)

    @cached_property
    def identity(self) -> Identity:
        """Digest of the entries that are used, in their order."""
        content = self.files[self.MODEL]
        used = [x["token_bytes"] for x in self._files.json(self.MODEL)]
        used = used[: self.MAX_VOCAB - self.NUM_SPECIAL]
        return identify("TikTokenizer", self.vocab_size, self.eod, [content], used)

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        try:
            if parse_special_tokens:
                return self._encoding.encode(text, allowed_special="all")
            return self._encoding.encode_ordinary(text)
        except BaseException as err:
            # A panic of its Rust code, as on millions of spaces in a row, is no Exception.
            if type(err).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer cannot encode the text: {err}") from None

    def detokenize(self, ids: list[int]) -> str:
        # Not megatron-core's own: it decodes token by token, which breaks characters of several.
        return self._encoding.decode(ids)

    def id_to_token(self, token: int) -> str:
        return self._encoding.decode([token])
