"""tools/preprocess_data.py --format: the same samples as from the lines themselves."""

from __future__ import annotations

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from fp8lm.data.datasets import build_datasets, check_files
from fp8lm.data.examples import data_identity
from fp8lm.runtime.errors import EXIT_BAD_INPUT, InputError
from tests.data.chats import BRACKETS, LINES, SIZES, sentencepiece, sft_config, write_lines

PAIR = {"prompt": "def ", "chosen": "yield", "rejected": "lambda"}


@pytest.fixture
def tokenizer(tmp_path):
    return sentencepiece(tmp_path)


@pytest.fixture
def brackets(tmp_path):
    (tmp_path / "t.jinja").write_text(BRACKETS)
    return {"chat_template": str(tmp_path / "t.jinja")}


@pytest.fixture
def preprocess(run_tool, tokenizer, tmp_path):
    def run(source, *arguments, form="chat"):
        return run_tool(
            "preprocess_data",
            *("--input", source, "--output-prefix", tmp_path / "P", "--format", form),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", tmp_path / "tok.model", *arguments),
        )

    return run


def test_preprocessed_and_read_from_json_are_the_same(tokenizer, brackets, preprocess, tmp_path):
    lines = write_lines(tmp_path / "x.jsonl", *LINES, {"prompt": "def", "completion": "yield"})
    assert preprocess(lines, "--chat-template", brackets["chat_template"], "--workers", "2") == 0
    prefix = str(tmp_path / "P_chat_document")
    config = sft_config(tmp_path, [lines], brackets)
    from_json = build_datasets(config, tokenizer, SIZES)
    indexed = build_datasets(sft_config(tmp_path, [prefix]), tokenizer, SIZES)
    for one, two in zip(from_json[:2], indexed[:2], strict=True):
        assert len(one) == len(two) and one.describe() == two.describe()
        for number in range(len(one)):
            for name, value in one[number].items():
                assert torch.equal(value, two[number][name]), name
    assert check_files(config, tokenizer, SIZES) == []
    assert data_identity(lines)["sha256"] != data_identity(prefix)["bin_sha256"]
    masks = IndexedDataset(str(tmp_path / "P_chat_mask"))  # Megatron reads it, too
    assert len(masks) == 21 and set(masks[20].tolist()) == {0, 1}


def test_a_preference_is_a_document_of_two_sequences(preprocess, tmp_path):
    assert preprocess(write_lines(tmp_path / "x.jsonl", PAIR, PAIR), form="preference") == 0
    documents = IndexedDataset(str(tmp_path / "P_preference_document"))
    assert documents.document_indices.tolist() == [0, 2, 4] and len(documents) == 4


def test_files_that_do_not_fit(tokenizer, brackets, preprocess, tmp_path):
    lines = write_lines(tmp_path / "x.jsonl", *LINES)
    assert preprocess(lines, "--chat-template", brackets["chat_template"]) == 0
    prefix = str(tmp_path / "P_chat_document")
    other = tmp_path / "other.jinja"
    other.write_text(BRACKETS + "!")
    mask = tmp_path / "P_chat_mask.bin"
    content = mask.read_bytes()

    def refused(complaint, path=prefix, tuning=None):
        with pytest.raises(InputError, match=complaint):
            build_datasets(sft_config(tmp_path, [path], tuning), tokenizer, SIZES)

    refused("another chat template", tuning={"chat_template": str(other)})
    refused("cannot be read", lines, {"chat_template": str(tmp_path / "no")})
    refused("does not exist", str(tmp_path / "no.jsonl"))
    mask.write_bytes(bytes([2]) + content[1:])
    refused("token id 2 in document 0")
    mask.write_bytes(content[:-1])
    refused("truncated")


def test_a_bad_line_ends_it_with_its_place_or_is_counted(preprocess, tmp_path, capsys):
    lines = write_lines(tmp_path / "x.jsonl", *LINES[:2], {"messages": []})
    template = ("--chat-template", str(tmp_path / "t.jinja"))
    (tmp_path / "t.jinja").write_text(BRACKETS)
    assert preprocess(lines, *template) == EXIT_BAD_INPUT
    assert "x.jsonl, line 3: no list of messages" in capsys.readouterr().err
    assert not list(tmp_path.glob("P_*"))
    assert preprocess(lines, *template, "--on-bad-line", "skip") == 0
    assert "1 bad document is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--format", "chat", "--append-eod"), ("--chat-template", "x")]
)
def test_options_of_another_format(run_tool, arguments, tmp_path, capsys):
    own = ("--input", "x", "--output-prefix", "P", "--tokenizer-type", "NullTokenizer")
    assert run_tool("preprocess_data", *own, *arguments) == EXIT_BAD_INPUT
    assert "is for --format" in capsys.readouterr().err
