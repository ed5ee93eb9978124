from __future__ import annotations

import json
import os

import numpy as np
import pytest

from fp8lm.data.identity import differences
from fp8lm.data.indexed import inspect_indexed
from fp8lm.data.token_checks import check_tokenizer
from fp8lm.data.tokenizer import TOKENIZER_TYPES, load_tokenizer, tokenizer_from_files
from fp8lm.runtime.errors import InputError
from tests.data.tokenizers_of_all_types import write_config, write_model

TEXT = "def yield größe 漢字"


def load(folder):
    return load_tokenizer("HuggingFaceTokenizer", str(folder))


@pytest.mark.parametrize("tokenizer_type", TOKENIZER_TYPES)
def test_a_tokenizer_is_its_files(tmp_path, tokenizer_type):
    if tokenizer_type == "TikTokenizer":
        pytest.importorskip("tiktoken")
    text = "1 2 3" if tokenizer_type == "NullTokenizer" else TEXT
    first = load_tokenizer(tokenizer_type, write_model(tokenizer_type, tmp_path), 9)
    second = tokenizer_from_files(tokenizer_type, first.files, 9)
    assert second.tokenize(text) == first.tokenize(text)
    assert second.identity == first.identity
    assert (second.eod, second.bos) == (first.eod, first.bos)
    json.dumps(first.identity)


def test_files_that_are_missing_are_named():
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        tokenizer_from_files("SentencePieceTokenizer", {"x": b""})


@pytest.fixture
def data_of(write_documents):
    """Token files that a tokenizer made."""

    def make(tokenizer, drop=(), documents=((2, 3), (4,))):
        identity = {k: v for k, v in tokenizer.identity.items() if k not in drop}
        ended = [[*document, tokenizer.eod] for document in documents]
        return inspect_indexed(
            write_documents(ended, dtype=np.int32, identity=identity, append_eod=True)
        )

    return make


def test_another_end_of_document_is_refused(hub_folder, data_of):
    """Two folders with the same tokenizer.json; a base model and its chat variant, say."""
    write_config(hub_folder, eos_token="<|endoftext|>")
    data = data_of(load(hub_folder))
    check_tokenizer(data, load(hub_folder))
    write_config(hub_folder, eos_token="<stop>")
    with pytest.raises(InputError, match="end-of-document id"):
        check_tokenizer(data, load(hub_folder))


@pytest.mark.parametrize("drop", [("eod", "encoding_sha256"), ("eod",)])
def test_sidecars_of_before_are_read(hub_folder, data_of, drop):
    write_config(hub_folder, eos_token="<|endoftext|>")
    data = data_of(load(hub_folder), drop)
    check_tokenizer(data, load(hub_folder))
    # Their end of document is not recorded, but the data have it.
    write_config(hub_folder, eos_token="<stop>")
    with pytest.raises(InputError, match="ends its documents with id 0"):
        check_tokenizer(data, load(hub_folder))


def test_a_file_written_anew_is_the_same_tokenizer(hub_folder):
    write_config(hub_folder, eos_token="<stop>")
    first = load(hub_folder).identity
    file = hub_folder / "tokenizer.json"
    model = json.loads(file.read_bytes())
    merges = model["model"]["merges"]
    model["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges]
    model["truncation"] = None
    file.write_text(json.dumps(model, indent=None))
    write_config(hub_folder, eos_token={"content": "<stop>"}, chat_template="{{ text }}")
    second = load(hub_folder).identity
    assert first["model_sha256"] != second["model_sha256"]
    assert not differences(first, second)


def change_merges(model):
    model["model"]["merges"].reverse()


def change_pre_tokenizer(model):
    model["pre_tokenizer"]["add_prefix_space"] = True


def change_normalizer(model):
    model["normalizer"] = {"type": "NFC"}


@pytest.mark.parametrize("change", [change_merges, change_pre_tokenizer, change_normalizer])
def test_what_changes_ids_changes_the_identity(hub_folder, change):
    first = load(hub_folder).identity
    file = hub_folder / "tokenizer.json"
    model = json.loads(file.read_bytes())
    change(model)
    file.write_text(json.dumps(model))
    assert differences(first, load(hub_folder).identity) == ["how text becomes ids"]


ADDED = {"content": "<tool>", "special": False, "normalized": False}
DECLARED = {
    "added_tokens.json": lambda size: ("added_tokens.json", {"<tool>": size}),
    "added_tokens_decoder": lambda size: (
        "tokenizer_config.json",
        {"added_tokens_decoder": {str(size): ADDED}},
    ),
}


@pytest.mark.parametrize("declared", DECLARED)
def test_tokens_declared_elsewhere_are_read(hub_folder, bpe, declared):
    plain = load(hub_folder)
    size = bpe.get_vocab_size()
    name, content = DECLARED[declared](size)
    (hub_folder / name).write_text(json.dumps(content))
    tokenizer = load(hub_folder)
    assert tokenizer.tokenize("a<tool>b") == [*plain.tokenize("a"), size, *plain.tokenize("b")]
    assert tokenizer.vocab_size == size + 1
    assert differences(plain.identity, tokenizer.identity)
    assert tokenizer_from_files("HuggingFaceTokenizer", tokenizer.files).vocab_size == size + 1


@pytest.mark.parametrize("declared", DECLARED)
def test_a_declared_id_that_cannot_be_is_refused(hub_folder, bpe, declared):
    name, content = DECLARED[declared](bpe.get_vocab_size() + 7)
    (hub_folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name}.*'<tool>'"):
        load(hub_folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"a": "b"}'),
        ("added_tokens.json", '{"a": 1e400}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}'),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("special_tokens_map.json", '{"eos_token": {"a": 1}}'),
    ],
)
def test_unreadable_settings_are_named(hub_folder, name, content):
    (hub_folder / name).write_text(content)
    with pytest.raises(InputError, match=name.split(".")[0] + "|eos_token"):
        load(hub_folder)


def test_an_end_of_document_that_is_named_and_absent_is_said(hub_folder):
    write_config(hub_folder, eos_token="<|im_end|>")
    with pytest.raises(InputError, match=r"'<\|im_end\|>' as eos_token, and has no such token"):
        load(hub_folder)


def test_a_file_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_a_file_whose_link_leads_nowhere_is_not_left_out(hub_folder, name):
    """As in a copy of a download's snapshot without its blobs."""
    (hub_folder / name).unlink(missing_ok=True)
    (hub_folder / name).symlink_to("../blobs/0123")
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        load(hub_folder)
