"""Tokenizers that the `tokenizers` package runs: Hugging Face folders and GPT-2's BPE.

A Hugging Face folder is read as transformers reads it. `tokenizer.json` holds the vocabulary.
Tokens that only `added_tokens_decoder` of `tokenizer_config.json` or, without that, the older
`added_tokens.json` declares are added to it. The same settings, and without `added_tokens_decoder`
first `special_tokens_map.json`, name the control tokens.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8lm.data.identity import Identity, identify
from fp8lm.data.tokenizer_files import (
    TEMPLATE,
    TokenizerFiles,
    read_file,
    read_folder,
    type_of_file,
)
from fp8lm.runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

MODEL, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
CONTROL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class ControlTokens:
    """Encodes text with a `tokenizers.Tokenizer` under one rule for control tokens.

    Their text is ordinary text unless `parse_special_tokens`. `absent` are control tokens that
    are named and have no id.
    """

    def __init__(
        self, fast: FastTokenizer, ids: set[int], unknown: int | None, absent: set[str]
    ) -> None:
        self._fast, self._absent = fast, absent
        # What no text may become. Unknown characters do become the unknown token.
        self._forbidden = ids - {unknown}

    def encode(self, text: str, parse_special_tokens: bool) -> list[int]:
        """Token ids; `InputError` where the rule cannot be kept."""
        self._fast.encode_special_tokens = not parse_special_tokens
        try:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        except Exception as err:  # the package raises plain Exception
            raise InputError(f"the tokenizer cannot encode the text: {err}") from None
        if parse_special_tokens:
            if named := [token for token in sorted(self._absent) if token in text]:
                raise InputError(f"the text holds control token {named[0]!r}, which has no id")
        elif not self._forbidden.isdisjoint(ids):
            token = self._fast.id_to_token(min(self._forbidden & set(ids)))
            raise InputError(
                f"the text holds {token!r}, which this tokenizer cannot write as plain text: "
                "take it out, or allow it with --parse-special-tokens"
            )
        return ids


class HuggingFaceTokenizer:
    """A `tokenizer.json`, or the folder that holds one.

    `eod` is the end-of-sequence token that the files beside it name, else a well-known one; `bos`
    the beginning-of-sequence token if they name one.
    """

    USUAL_EOD = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")

    def __init__(self, files: TokenizerFiles) -> None:
        self._files, self.files = files, files.contents
        self._fast = _parse_model(files)
        _add_declared_tokens(self._fast, files)
        named = _named_tokens(files)
        # Ids may have holes: what the embedding needs is the largest id, not the count.
        self.vocab_size = max(self._fast.get_vocab().values(), default=-1) + 1
        self.eod = self._find_eod(named.get("eos_token"))
        bos = named.get("bos_token")
        self.bos = self._fast.token_to_id(bos) if bos else None
        self._control = self._control_tokens(named)

    @staticmethod
    def read(path: Path) -> TokenizerFiles:
        """The files of a folder, or of a `tokenizer.json` of any name and what is beside it."""
        optional = (CONFIG, SPECIAL_MAP, ADDED, TEMPLATE)
        if path.is_dir():
            return read_folder(path, (MODEL,), optional)
        beside = read_folder(path.parent, (), optional)
        return TokenizerFiles(str(path), {MODEL: read_file(path), **beside.contents})

    @cached_property
    def identity(self) -> Identity:
        """Digest of what turns text into ids, with the tokens of all files."""
        model = self._files.json_object(MODEL)
        added = [
            [number, t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special]
            for number, t in self._fast.get_added_tokens_decoder().items()
        ]
        encoding = {
            "normalizer": model.get("normalizer"),
            "pre_tokenizer": model.get("pre_tokenizer"),
            "model": _canonical_model(model.get("model") or {}),
            "added_tokens": sorted(added),
        }
        content = [self.files[MODEL]]
        return identify("HuggingFaceTokenizer", self.vocab_size, self.eod, content, encoding)

    def _find_eod(self, named: str | None) -> int:
        for token in [named] if named else self.USUAL_EOD:
            token_id = self._fast.token_to_id(token)
            if token_id is not None:
                return token_id
        if named:
            raise InputError(
                f"the tokenizer {self._files.source} names {named!r} as eos_token, and has no "
                f"such token: name one that it has, or add this one to its {MODEL}"
            )
        raise InputError(
            f"the tokenizer {self._files.source} has no end-of-document token: name one of its "
            f'tokens as eos_token in {CONFIG}, e.g. {{"eos_token": "</s>"}}'
        )

    def _control_tokens(self, named: dict[str, str]) -> ControlTokens:
        """The tokens marked as special and those that the settings name."""
        numbers = {token: self._fast.token_to_id(token) for token in named.values()}
        present = {token: number for token, number in numbers.items() if number is not None}
        absent = numbers.keys() - present.keys()
        self._fast.add_special_tokens(sorted(present))
        known = self._fast.get_added_tokens_decoder()
        ids = {number for number, token in known.items() if token.special}
        ids |= set(present.values())
        return ControlTokens(self._fast, ids, self._unknown(), absent)

    def _unknown(self) -> int | None:
        """The id that characters without a token become."""
        model = self._files.json_object(MODEL).get("model") or {}
        if "unk_id" in model:
            return model["unk_id"]
        return self._fast.token_to_id(model.get("unk_token") or "")

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        return self._control.encode(text, parse_special_tokens)

    def detokenize(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def id_to_token(self, token: int) -> str:
        return self._fast.id_to_token(token) or ""


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from a folder with `vocab.json` and `merges.txt`; `eod` is
    `<|endoftext|>`, and there is no `bos`."""

    EOD = "<|endoftext|>"
    NAMES = ("vocab.json", "merges.txt")

    def __init__(self, files: TokenizerFiles) -> None:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        self._files, self.files, self.bos = files, files.contents, None
        try:
            model = models.BPE(*self._parse())
        except Exception as err:  # the package raises plain Exception
            raise InputError(f"tokenizer_model {files.source} cannot be read: {err}") from None
        self._fast = FastTokenizer(model)
        self._fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._fast.decoder = decoders.ByteLevel()
        self.vocab_size = max(self._fast.get_vocab().values(), default=-1) + 1
        eod = self._fast.token_to_id(self.EOD)
        if eod is None:
            raise InputError(
                f"vocab.json of tokenizer {files.source} has no {self.EOD}, which marks the end "
                "of a document"
            )
        self.eod = eod
        self._fast.add_special_tokens([self.EOD])
        self._control = ControlTokens(self._fast, {eod}, None, set())

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """The two files of a folder, and the chat template in it, if there is one."""
        return read_folder(path, cls.NAMES, (TEMPLATE,))

    @cached_property
    def identity(self) -> Identity:
        """Digest of the vocabulary and of the merges in their order."""
        content = [self.files[name] for name in self.NAMES]
        return identify("GPT2BPETokenizer", self.vocab_size, self.eod, content, self._parse())

    def _parse(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Vocabulary and merges; the text of merges.txt without its version and blank lines."""
        lines = self.files["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
        merges = [_pair(x) for x in lines if x and not x.startswith("#version")]
        return self._files.json_object("vocab.json"), merges

    def tokenize(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        return self._control.encode(text, parse_special_tokens)

    def detokenize(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def id_to_token(self, token: int) -> str:
        return self._fast.id_to_token(token) or ""


def _pair(line: str) -> tuple[str, str]:
    parts = line.split(" ")
    if len(parts) != 2:
        raise ValueError(f"{line[:100]!r} of merges.txt is not two tokens")
    return parts[0], parts[1]


def _parse_model(files: TokenizerFiles) -> FastTokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        fast = FastTokenizer.from_str(files.contents[MODEL].decode("utf-8"))
    except Exception as err:  # the package raises plain Exception
        hint = type_of_file(files.source, "HuggingFaceTokenizer")
        raise InputError(f"tokenizer_model {files.source} cannot be read: {err}{hint}") from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _add_declared_tokens(fast: FastTokenizer, files: TokenizerFiles) -> None:
    """Add the tokens that other files than the model's declare; each must get its declared id."""
    name, declared = _declared_tokens(files)
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    missing = [(i, token) for i, token in sorted(declared.items()) if token.content not in known]
    # In runs of one kind, not one by one: each call builds the matcher anew.
    for special, run in groupby(missing, key=lambda item: item[1].special):
        add = fast.add_special_tokens if special else fast.add_tokens
        add([token for _, token in run])
    for number, token in missing:
        actual = fast.token_to_id(token.content)
        if actual != number:
            raise InputError(
                f"{name} of tokenizer {files.source} gives {token.content!r} the id {number}, and "
                f"after the tokens of {MODEL} it gets {actual}: make the two files agree"
            )


def _declared_tokens(files: TokenizerFiles) -> tuple[str, dict[int, AddedToken]]:
    """Which file declares added tokens, and those tokens by id."""
    from tokenizers import AddedToken

    config = files.json_object(CONFIG)
    name = CONFIG if "added_tokens_decoder" in config else ADDED
    try:
        if name == CONFIG:
            decoder = config["added_tokens_decoder"]
            return name, {int(i): _added_token(fields) for i, fields in decoder.items()}
        special = {token for tokens in _named_lists(files).values() for token in tokens}
        return name, {
            int(number): AddedToken(
                content, normalized=content not in special, special=content in special
            )
            for content, number in files.json_object(ADDED).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"{name} of tokenizer {files.source} does not list added tokens as transformers "
            "writes them"
        ) from None


def _added_token(fields: dict[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in flags if flag in fields})


def _named_lists(files: TokenizerFiles) -> dict[str, list[str]]:
    """Control tokens by the names of the settings, such as `eos_token`."""
    settings = files.json_object(CONFIG)
    if "added_tokens_decoder" not in settings:
        settings = settings | files.json_object(SPECIAL_MAP)
    named = {}
    for key in (*(f"{name}_token" for name in CONTROL_NAMES), "additional_special_tokens"):
        value = settings.get(key) or []
        tokens = [_content(token) for token in (value if isinstance(value, list) else [value])]
        if not all(isinstance(token, str) for token in tokens):
            raise InputError(f"{key} of tokenizer {files.source} does not name a token")
        if tokens:
            named[key] = tokens
    return named


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _named_tokens(files: TokenizerFiles) -> dict[str, str]:
    """As `_named_lists`, one name a token."""
    return {
        f"{key}{index or ''}": token
        for key, tokens in _named_lists(files).items()
        for index, token in enumerate(tokens)
    }


def _canonical_model(model: dict[str, Any]) -> dict[str, Any]:
    """The model without fields at their defaults, and merges as pairs, whatever wrote the file."""
    model = {k: v for k, v in model.items() if v is not None and v is not False and v != ""}
    if isinstance(merges := model.get("merges"), list):
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in merges]
    return model
