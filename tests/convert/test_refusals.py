"""What cannot be converted: exit code 2, one line that names the thing, and no output."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.models import IDS, LLAMA, config_of, save_model
from tests.convert.test_hugging_face import save_there
from tests.data.tokenizers_of_all_types import write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def refused(run, tmp_path):
    """Convert, which must end with exit code 2 and one line that says `says`."""

    def check(source, target, folder, *more, says):
        code, said = run(source, target, folder, tmp_path / "out", *more)
        assert code == 2
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0], said
        assert not (tmp_path / "out").exists()

    return check


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama of transformers, in one file."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    save_there(folder, "llama", max_shard_size="1GB")
    return folder


@pytest.fixture
def llama(saved, tmp_path):
    """A copy to change."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "bert"}, "model_type = bert"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x'"),
        ({"rope_scaling": [1]}, "rope_scaling = [1]"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor = 2.0"),
        ({"quantization_config": [1]}, "quantization_config = [1]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window = 'x'"),
        ({"layer_types": 3}, "layer_types = 3"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ["),
        ({"vocab_size": IDS + 1}, f"vocab_size = {IDS + 1}"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_size": "64"}, "hidden_size = '64'"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"intermediate_size": 128}, "gate_proj.weight has shape [96, 64]"),
    ],
)
def test_another_model(keys, says, llama, refused):
    change_config(llama, **keys)
    refused("hf", "fp8lm", llama, says=says)


def test_tensors_that_are_missing_or_left_over(llama, refused):
    change_tensors(llama, lambda tensors: tensors.pop("model.norm.weight"))
    refused("hf", "fp8lm", llama, says="no tensor model.norm.weight")
    change_tensors(
        llama,
        lambda tensors: tensors.update(
            {"model.norm.weight": torch.ones(64), "score.weight": torch.ones(2, 64)}
        ),
    )
    refused("hf", "fp8lm", llama, says="score.weight has no place")


def test_damaged_files(llama, refused):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:4], b"", b"\xff" * 64):
        path.write_bytes(content)
        refused("hf", "fp8lm", llama, says="model.safetensors is damaged or truncated")
    path.rename(llama / "pytorch_model.bin")
    refused("hf", "fp8lm", llama, says="pickled weights")
    (llama / "config.json").write_text("[1]")
    refused("hf", "fp8lm", llama, says="not a JSON object")
    (llama / "config.json").write_text("{")
    refused("hf", "fp8lm", llama, says="config.json cannot be read")
    (llama / "config.json").unlink()
    refused("hf", "fp8lm", llama, says="holds no config.json")


def test_a_missing_shard(tmp_path, refused):
    folder = save_there(tmp_path / "hf", "llama")
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    refused("hf", "fp8lm", folder, says="is incomplete: model.safetensors.index.json names")


def test_an_export_with_a_tokenizer_of_more_tokens_than_rows(refused, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, rows=128)
    for target in ("hf", "megatron"):
        refused("fp8lm", target, folder, says="250 tokens, and the model's table 128 rows")


def test_a_tokenizer_of_more_tokens_than_rows(llama, refused):
    write_model("HuggingFaceTokenizer", llama)
    refused("hf", "fp8lm", llama, says=f"277 tokens, and the model's table {IDS} rows")


def test_names_and_folders(llama, run, refused, tmp_path):
    refused("hf", "fp8lm", "Qwen/Qwen3-0.6B", says="names on a hub are not downloaded")
    refused("fp8lm", "hf", llama, says="no checkpoint in")
    refused("hf", "hf", llama, says="--from hf --to hf is no conversion")
    refused("hf", "fp8lm", llama, "--dtype", "fp8", says="--dtype")
    refused("hf", "fp8lm", llama, "--tokenizer-type", "TikTokenizer", says="--tokenizer-type")
    code, said = run("hf", "fp8lm", llama, tmp_path / ("x" * 250))
    assert code == 2 and "cannot be written: File name too long" in said
    code, said = run("hf", "fp8lm", llama, llama)
    assert code == 2 and "is there already" in said


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"position_embedding_type": "none"}, "model.position_embedding_type = none"),
        ({"swiglu": True}, "model.swiglu = true"),
        ({"num_query_groups": 2}, "model.num_query_groups = 2"),
        (LLAMA | {"swiglu": False}, "model.swiglu = false"),
        (LLAMA | {"rotary_percent": 0.5}, "model.rotary_percent = 0.5"),
        (LLAMA | {"qk_layernorm": True, "add_qkv_bias": True}, "model.add_qkv_bias = true"),
        (LLAMA | {"use_parallel_residual": True}, "model.use_parallel_residual = true"),
    ],
)
def test_a_model_that_transformers_lacks(keys, says, refused, tmp_path):
    refused("fp8lm", "hf", save_model(tmp_path / "ck", keys), says=says)


def test_a_checkpoint_whose_config_is_of_another_model(refused, tmp_path):
    config = config_of(LLAMA)
    wrong = config.model_copy(
        update={"model": config.model.model_copy(update={"add_qkv_bias": True})}
    )
    folder = save_model(tmp_path / "ck", config=config, says=wrong)
    refused("fp8lm", "hf", folder, says="linear_qkv.bias is in one of them only")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(refused, llama, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    change_tensors(llama, spoil)
    refused("hf", "fp8lm", llama, says="model.layers.1.mlp.up_proj.weight has NaN or infinite")
