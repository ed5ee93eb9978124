from __future__ import annotations

import json
import sys

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from fp8lm.config import TokenizerConfig
from fp8lm.data.tokenizer import (
    TOKENIZER_TYPES,
    NullTokenizer,
    build_tokenizer,
    load_tokenizer,
    padded_vocab_size,
)
from fp8lm.runtime.errors import InputError
from tests.data.tokenizers_of_all_types import write_tiktoken

TEXT = "def f(x):\n\treturn  x  # größe 漢字 🙂\r\n"


def test_types_are_the_configs():
    allowed = TokenizerConfig.model_json_schema()["properties"]["tokenizer_type"]["enum"]
    assert sorted(allowed) == sorted(TOKENIZER_TYPES)


def test_null_tokenizer_has_megatrons_meaning():
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100))
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.tokenize("0 99\n100") == [0, 99, 100]
    assert tokenizer.detokenize([3, 1]) == "3 1"
    for bad in ("1 two", "101", "-1"):
        with pytest.raises(InputError):
            tokenizer.tokenize(bad)


@pytest.mark.parametrize("as_file", [False, True])
def test_hugging_face_from_folder_and_file(hub_folder, bpe, as_file):
    path = hub_folder / "tokenizer.json" if as_file else hub_folder
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(path))
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod == bpe.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == bpe.get_vocab_size()


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>"}])
def test_hugging_face_eod_is_the_named_token(hub_folder, bpe, eos):
    (hub_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hub_folder))
    assert tokenizer.eod == bpe.token_to_id("<stop>")


def test_hugging_face_adds_and_cuts_nothing(hub_folder, bpe):
    settings = json.loads(bpe.to_str())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    settings["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["<stop>", 1],
        "cls": ["<|endoftext|>", 0],
    }
    (hub_folder / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hub_folder))
    ids = tokenizer.tokenize(TEXT)
    assert ids == bpe.encode(TEXT, add_special_tokens=False).ids and len(ids) > 2


def test_gpt2_bpe(gpt2_folder, bpe):
    tokenizer = load_tokenizer("GPT2BPETokenizer", str(gpt2_folder))
    assert tokenizer.tokenize(TEXT) == bpe.encode(TEXT).ids
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod == bpe.token_to_id("<|endoftext|>")
    assert tokenizer.eod not in tokenizer.tokenize("a<|endoftext|>b")


def test_tiktoken(tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer("TikTokenizer", write_tiktoken(tmp_path / "vocab.json"))
    assert tokenizer.vocab_size == 1256
    assert tokenizer.tokenize("A") == [1000 + ord("A")]
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match=r"bad\.json"):
        load_tokenizer("TikTokenizer", str(tmp_path / "bad.json"))


def test_tiktoken_that_is_not_installed_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InputError, match="pip install tiktoken"):
        load_tokenizer("TikTokenizer", write_tiktoken(tmp_path / "vocab.json"))


def test_identity_tells_models_apart(hub_folder):
    first = load_tokenizer("HuggingFaceTokenizer", str(hub_folder)).identity
    file = hub_folder / "tokenizer.json"
    model = json.loads(file.read_bytes())
    model["model"]["merges"].pop()
    file.write_text(json.dumps(model))
    second = load_tokenizer("HuggingFaceTokenizer", str(hub_folder)).identity
    assert first != second
    assert NullTokenizer(5).identity != NullTokenizer(6).identity


@pytest.mark.parametrize(
    ("tokenizer_type", "files", "message"),
    [
        ("SentencePieceTokenizer", {"tok.model": b""}, "not a SentencePiece model"),
        ("SentencePieceTokenizer", {"tok.model": b"\x00junk"}, "not a SentencePiece model"),
        ("HuggingFaceTokenizer", {"tokenizer.json": b"{"}, "cannot be read"),
        ("HuggingFaceTokenizer", {"a.model": b""}, "use SentencePieceTokenizer with"),
        ("HuggingFaceTokenizer", {"vocab.json": b"", "merges.txt": b""}, "use GPT2BPETokenizer"),
        ("GPT2BPETokenizer", {"tokenizer.json": b""}, "use HuggingFaceTokenizer"),
        ("GPT2BPETokenizer", {"vocab.json": b"[", "merges.txt": b""}, "cannot be read"),
        ("GPT2BPETokenizer", {"vocab.json": b'{"a": 0}', "merges.txt": b""}, "endoftext"),
    ],
)
def test_unusable_models_are_named(tmp_path, tokenizer_type, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "tok.model" if "tok.model" in files else tmp_path
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tokenizer_type, str(path))
    assert str(tmp_path) in str(error.value)


def test_hugging_face_without_end_of_document(tmp_path):
    tokenizer = FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="eos_token"):
        load_tokenizer("HuggingFaceTokenizer", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SentencePieceTokenizer", "none.model"), "none.model does not exist"),
        (("HuggingFaceTokenizer", "gpt2"), "not downloaded"),
        (("GPT2BPETokenizer", None), "tokenizer_model is not set"),
        (("NullTokenizer", None), "vocab_size"),
        (("Bert", "x"), "SentencePieceTokenizer"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(*arguments)


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "ranks", "padded"),
    [
        (1, 128, 1, 128),
        (128, 128, 1, 128),
        (129, 128, 1, 256),
        (50257, 128, 8, 51200),
        (7, 1, 2, 8),
    ],
)
def test_padded_vocab_size(vocab_size, divisible_by, ranks, padded):
    assert padded_vocab_size(vocab_size, divisible_by, ranks) == padded
