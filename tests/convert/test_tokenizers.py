"""A tokenizer exported is one that transformers reads as this program does, and comes back."""

from __future__ import annotations

import json

import pytest

from fp8lm.checkpoint import open_checkpoint
from fp8lm.data.tokenizer import load_tokenizer
from fp8lm.training.provenance import tokenizer_of
from tests.convert.models import LLAMA, config_of, save_model
from tests.convert.test_hugging_face import save_there
from tests.data.tokenizers_of_all_types import write_model

pytestmark = pytest.mark.slow

TEXTS = ["def return lambda\n\n  yield x = 1", "  two  spaces", "Äpfel 漢字 \t tab", "", " a"]


@pytest.fixture(params=["HuggingFaceTokenizer", "GPT2BPETokenizer", "SentencePieceTokenizer"])
def tokenizer(request, tmp_path):
    return load_tokenizer(request.param, write_model(request.param, tmp_path))


def test_transformers_reads_it_as_it_is_here(tokenizer, convert, tmp_path):
    from transformers import AutoTokenizer

    kind = tokenizer.identity["tokenizer_type"]
    section = {"tokenizer_type": kind, "tokenizer_model": str(tmp_path)}
    config = config_of(LLAMA, {"preset": "bf16"}, section)
    folder = save_model(tmp_path / "ck", config=config, tokenizer=tokenizer)
    convert("fp8lm", "hf", folder, tmp_path / "hf")
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert there.eos_token_id == tokenizer.eod
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert there.encode(text, add_special_tokens=False) == ids
        assert there.decode(ids) == tokenizer.detokenize(ids)
    convert("hf", "fp8lm", tmp_path / "hf", tmp_path / "back")
    back = tokenizer_of(open_checkpoint(tmp_path / "back"))
    assert back.identity == tokenizer.identity


def test_a_chat_template_in_a_file_comes_along(convert, tmp_path):
    folder = save_there(tmp_path / "hf", "llama", vocab_size=300)
    write_model("HuggingFaceTokenizer", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    convert("hf", "fp8lm", folder, tmp_path / "ck")
    tokenizer = tokenizer_of(open_checkpoint(tmp_path / "ck"))
    assert tokenizer.files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(tokenizer.files["tokenizer_config.json"])["eos_token"] == "<stop>"
