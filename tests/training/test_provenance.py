"""Checkpoints know their tokenizer and data by content, and carry the tokenizer's files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fp8lm.checkpoint import open_checkpoint
from fp8lm.data.indexed_writer import IndexedWriter
from fp8lm.data.tokenizer import load_tokenizer
from fp8lm.runtime.errors import InputError
from tests.data.tokenizers_of_all_types import train_bpe, write_config, write_model

pytestmark = pytest.mark.slow

BPE = "HuggingFaceTokenizer"


@pytest.fixture
def hub(tmp_path):
    """A Hugging Face folder."""
    folder = tmp_path / "hub"
    folder.mkdir()
    write_model(BPE, folder)
    return folder


@pytest.fixture
def config(tiny_config, tmp_path):
    """A run of `iterations` with the tokenizer in `model` and checkpoints in `ck`."""

    def make(model, iterations=2, kind=BPE, data=None, **checkpoint):
        both = {key: str(tmp_path / "ck") for key in ("save", "load")}
        return tiny_config(
            {"checkpoint": both | checkpoint, "data": data or {}},
            {"train": {"exit_interval": iterations, "eval_iters": 0}},
            {
                "tokenizer": {
                    "tokenizer_type": kind,
                    "tokenizer_model": str(model),
                    "vocab_size": None,
                }
            },
        )

    return make


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", BPE, "GPT2BPETokenizer", "TikTokenizer"]
)
def test_the_files_of_every_tokenizer_travel(kind, config, train_run, tmp_path):
    if kind == "TikTokenizer":
        pytest.importorskip("tiktoken")
    source = tmp_path / "tokenizer"
    source.mkdir()
    model = write_model(kind, source)
    original = load_tokenizer(kind, model)
    train_run(config(model, kind=kind))
    checkpoint = open_checkpoint(tmp_path / "ck")
    assert {name: checkpoint.read_file(name) for name in checkpoint.files} == original.files
    shutil.rmtree(source)
    with pytest.raises(InputError) as refused:
        train_run(config(model, iterations=3, kind=kind))
    assert str(checkpoint.folder) in str(refused.value)
    # The folder serves as the tokenizer's, for a training too.
    files = checkpoint.common["tokenizer"]["files"]
    moved = checkpoint.folder / files[0] if len(files) == 1 else checkpoint.folder
    assert load_tokenizer(kind, str(moved)).identity == original.identity
    train_run(config(moved, iterations=3, kind=kind))
    assert open_checkpoint(tmp_path / "ck").files == checkpoint.files


def test_another_tokenizer_at_the_same_path(hub, config, train_run, capsys):
    train_run(config(hub))
    write_config(hub, eos_token="<|endoftext|>")
    with pytest.raises(InputError, match="end-of-document id") as refused:
        train_run(config(hub, iterations=3))
    assert "checkpoint.allow_tokenizer_change=true" in str(refused.value)
    assert "iter_0000002" in str(refused.value)  # where the right one is
    capsys.readouterr()
    train_run(config(hub, iterations=3, allow_tokenizer_change=True))
    assert "warning: another tokenizer than that of" in capsys.readouterr().out
    train_run(config(hub, iterations=4))  # it is the checkpoint's own from now on
    assert "warning:" not in capsys.readouterr().out


def test_a_larger_tokenizer_must_keep_the_ids(hub, config, train_run, tmp_path, capsys):
    train_run(config(hub))
    larger = tmp_path / "larger"
    larger.mkdir()
    bpe = train_bpe()
    bpe.add_special_tokens([f"<extra {n}>" for n in range(200)])
    bpe.save(str(larger / "tokenizer.json"))
    write_config(larger, eos_token="<stop>")
    with pytest.raises(InputError, match=r"checkpoint\.extend_embeddings=true"):
        train_run(config(larger, iterations=3))
    other = tmp_path / "other"
    other.mkdir()
    swapped = json.loads((larger / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    write_config(other, eos_token="<stop>")
    with pytest.raises(InputError, match="does not extend that of"):
        train_run(config(other, iterations=3, extend_embeddings=True))
    train_run(config(larger, iterations=3, extend_embeddings=True))
    assert (
        "extended with initial values: embedding.word_embeddings.weight" in capsys.readouterr().out
    )


def write_data(prefix, seed):
    tokens = np.random.default_rng(seed).integers(0, 63, (40, 20), dtype=np.uint16)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in tokens:
            writer.add(document)
        writer.publish({"tokenizer": {}})
    prefix.with_name(f"{prefix.name}.json").unlink()  # as Megatron would have written them
    return str(prefix)


def test_data_replaced_at_the_same_path(hub, config, train_run, tmp_path, capsys):
    prefix = write_data(tmp_path / "P", seed=1)
    data = {"mock_data": False, "data_path": [prefix], "split": "1,0,0"}
    data["data_cache_path"] = str(tmp_path / "cache")
    train_run(config(hub, data=data))
    train_run(config(hub, data=data, iterations=3))
    assert "other tokens" not in capsys.readouterr().out
    write_data(tmp_path / "P", seed=2)  # as many tokens, in documents of the same lengths
    train_run(config(hub, data=data, iterations=4))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "other tokens" in line]
    assert line.startswith(f" warning: {prefix} ")
