"""The text of a control token in a document: plain text unless it is asked for."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from fp8lm.data.tokenizer import TOKENIZER_TYPES, load_tokenizer
from fp8lm.runtime.errors import InputError
from tests.data.tokenizers_of_all_types import write_config, write_model

ENDS = {
    "SentencePieceTokenizer": "</s>",
    "HuggingFaceTokenizer": "<stop>",
    "GPT2BPETokenizer": "<|endoftext|>",
    "TikTokenizer": "</s>",
}


@pytest.mark.parametrize("tokenizer_type", ENDS)
def test_it_ends_no_document(tmp_path, tokenizer_type):
    if tokenizer_type == "TikTokenizer":
        pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(tokenizer_type, write_model(tokenizer_type, tmp_path))
    text = f"def {ENDS[tokenizer_type]} yield"
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids
    assert tokenizer.detokenize(ids) == text
    parsed = tokenizer.tokenize(text, parse_special_tokens=True)
    assert parsed.count(tokenizer.eod) == 1
    before, after = parsed[: parsed.index(tokenizer.eod)], parsed[parsed.index(tokenizer.eod) + 1 :]
    assert tokenizer.tokenize("def ") == before and tokenizer.tokenize(" yield") == after
    # The rule is that of one call.
    assert tokenizer.tokenize(text) == ids


def test_of_a_null_tokenizer_every_id_is_what_it_says():
    assert set(TOKENIZER_TYPES) == {*ENDS, "NullTokenizer"}
    tokenizer = load_tokenizer("NullTokenizer", None, 9)
    assert tokenizer.tokenize("1 9") == [1, tokenizer.eod]


def test_further_control_tokens_of_a_sentencepiece_model(tmp_path):
    model = write_model("SentencePieceTokenizer", tmp_path)
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    stop = tokenizer.tokenize("<|stop|>", parse_special_tokens=True)
    assert len(stop) == 1 and not set(stop) & set(tokenizer.tokenize("a <|stop|>"))


def test_a_model_that_cannot_write_it_as_text_says_so(tmp_path):
    fast = FastTokenizer(models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, eos_token="</s>", unk_token="?")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert tokenizer.tokenize("a b a") == [0, 2, 0]  # an unknown word is no control token
    assert tokenizer.tokenize("a </s>", parse_special_tokens=True) == [0, 1]
    with pytest.raises(InputError, match="</s>"):
        tokenizer.tokenize("a </s>")


def test_one_that_is_named_and_has_no_id(hub_folder):
    write_config(hub_folder, additional_special_tokens=["<extra>"])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hub_folder))
    assert tokenizer.detokenize(tokenizer.tokenize("a <extra>")) == "a <extra>"
    with pytest.raises(InputError, match="<extra>"):
        tokenizer.tokenize("a <extra>", parse_special_tokens=True)


def test_settings_are_read_in_transformers_order(hub_folder, bpe):
    """`special_tokens_map.json` counts unless the newer `added_tokens_decoder` is there."""
    (hub_folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<stop>"}))
    write_config(hub_folder, eos_token="<|endoftext|>")
    assert load_tokenizer("HuggingFaceTokenizer", str(hub_folder)).eod == bpe.token_to_id("<stop>")
    write_config(hub_folder, eos_token="<|endoftext|>", added_tokens_decoder={})
    assert load_tokenizer("HuggingFaceTokenizer", str(hub_folder)).eod == 0


def test_text_that_a_tokenizer_cannot_encode_is_an_input_error(tmp_path):
    fast = FastTokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="?"))
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    with pytest.raises(InputError, match="cannot encode"):
        tokenizer.tokenize("b")


def test_a_panic_of_tiktoken_is_an_input_error(tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer("TikTokenizer", write_model("TikTokenizer", tmp_path))
    with pytest.raises(InputError, match="cannot encode"):
        tokenizer.tokenize(" " * 3_000_000)
