"""HuggingFace models: the logits of transformers are those here, both ways, for every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from fp8lm.config import build_config
from fp8lm.convert.safetensors_files import SafetensorsFolder
from fp8lm.layers.param import named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.model import GPTModel
from fp8lm.numerics import FP32 as FP32_FORMAT
from fp8lm.numerics import format_by_name
from tests.convert.models import (
    CPU,
    FP32,
    IDS,
    KERNELS,
    LLAMA,
    SHAPES,
    as_bytes,
    config_of,
    error,
    logits_here,
    logits_there,
    restored,
    save_model,
    tokens,
)
from tests.layers.test_smoothing import ExactCasts
from tests.training.contents import contents, expect, values
from tests.training.runs import save_again

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("shape", SHAPES)
def test_export_has_the_same_logits(shape, convert, tmp_path):
    folder = save_model(tmp_path / "ck", SHAPES[shape], FP32)
    convert("fp8lm", "hf", folder, tmp_path / "hf", "--dtype", "fp32")
    expected = logits_here(folder)
    assert expected.std() > 0.01
    assert error(logits_there(tmp_path / "hf"), expected) < 1e-5


SMALL = {
    "vocab_size": IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THERE = {
    "llama": ("LlamaConfig", SMALL | {"num_key_value_heads": 2, "head_dim": 32}),
    "llama scaled": (
        "LlamaConfig",
        SMALL
        | {"rope_parameters": ROPE | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}}
        | {"tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", SMALL | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "gpt_neox sequential": ("GPTNeoXConfig", SMALL | {"use_parallel_residual": False}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
}


def save_there(folder, kind, max_shard_size="60KB", **keys):
    """A model of transformers with random weights, in several files."""
    import transformers

    name, given = THERE[kind]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**given | keys)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape) + (parameter.mean() == 1))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("kind", THERE)
def test_import_has_the_same_logits(kind, convert, tmp_path):
    folder = save_there(tmp_path / "hf", kind)
    assert len(list(folder.glob("*.safetensors"))) > 1
    convert("hf", "fp8lm", folder, tmp_path / "ck")
    expected = logits_there(folder)
    assert expected.std() > 0.01
    assert error(logits_here(tmp_path / "ck"), expected) < 1e-5
    # And back: every byte of every tensor.
    convert("fp8lm", "hf", tmp_path / "ck", tmp_path / "back", "--dtype", "fp32")
    first, second = (SafetensorsFolder(tmp_path / name) for name in ("hf", "back"))
    names = {name.replace("embed_out", "lm_head") for name in second.tensors}
    assert names == {name.replace("embed_out", "lm_head") for name in first.tensors}
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("preset", ["o3", "bf16"])
def test_bf16_export_is_rounded_from_the_master(preset, convert, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": preset})
    said = convert("fp8lm", "hf", folder, tmp_path / "bf16")
    assert "weights: bf16, from the stored master" in said and "rounded to nearest" in said
    convert("fp8lm", "hf", folder, tmp_path / "fp32", "--dtype", "fp32")
    rounded, exact = (SafetensorsFolder(tmp_path / name) for name in ("bf16", "fp32"))
    for name in exact.tensors:
        assert torch.equal(rounded.read(name), exact.read(name).bfloat16()), name
    there = logits_there(tmp_path / "bf16")
    assert error(there, logits_there(tmp_path / "fp32")) < 0.02


@torch.no_grad()
def logits_in_training(folder, precision):
    """[B,S,ids] of LLAMA with the masters of a checkpoint, as training computes; nothing rounds."""
    config, stored = config_of(LLAMA, precision), contents(folder)
    recipe = Recipe.from_config(config.precision, ExactCasts(), CPU)
    gemm = replace(recipe.gemm, output=torch.float32)
    recipe = replace(recipe, gemm=gemm, weight=FP32_FORMAT, high_precision=FP32_FORMAT)
    rows = len(stored["model.embedding.word_embeddings.weight.payload"])
    model = GPTModel(config.model, rows, recipe)
    for name, weight in named_params(model).items():
        master = values(stored, f"optimizer.master.{name}")
        whole = master.reshape(weight.spec.shape)  # gate and up are stored as two
        weight.model_param.copy_(KERNELS.quantize(whole, FP32_FORMAT))
    return model(tokens()).transpose(0, 1)[..., :IDS]


@pytest.mark.parametrize("preset", ["te", "o3"])
def test_export_needs_no_factors_of_smoothing(preset, convert, tmp_path):
    """They are of a micro-batch, powers of two, and on both sides of the product."""
    precision = {"preset": preset, "smooth_swiglu": True}
    folder = save_model(tmp_path / "ck", LLAMA, precision)
    convert("fp8lm", "hf", folder, tmp_path / "hf", "--dtype", "fp32")
    assert error(logits_there(tmp_path / "hf"), logits_in_training(folder, precision)) < 1e-5


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt"])
def test_fp32_export_imported_back_is_the_master_in_every_byte(shape, convert, tmp_path):
    folder = save_model(tmp_path / "ck", SHAPES[shape], {"preset": "o3"})
    convert("fp8lm", "hf", folder, tmp_path / "hf", "--dtype", "fp32")
    convert("hf", "fp8lm", tmp_path / "hf", tmp_path / "back")
    before, after = contents(folder), contents(tmp_path / "back")
    names = [name for name in after if name.endswith(".payload")]
    assert len(names) > 10
    for name in names:
        master = name.replace("model.", "optimizer.master.", 1)
        kind = master if master in before else name
        expected = values(before, kind.removesuffix(".payload"))
        assert after[name].dtype == torch.float32
        if (expected.shape == after[name].shape and "embed" in name) or "output" in name:
            expected, after[name] = expected[:IDS], after[name][:IDS]  # without padding
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "neox"])
@pytest.mark.parametrize("keys", [{}, {"first_last_layers_bf16": True}], ids=["all", "inner"])
def test_fp8_export_imported_back_is_equal_in_every_byte(shape, keys, convert, tmp_path):
    model = SHAPES[shape] | {"num_layers": 3}
    folder = save_model(tmp_path / "ck", model, {"preset": "o3", **keys})
    convert("fp8lm", "hf-fp8", folder, tmp_path / "hf")
    convert("hf", "fp8lm", tmp_path / "hf", tmp_path / "back")
    before, after = contents(folder), contents(tmp_path / "back")
    weights = {name for name in before if name.startswith("model.")}
    assert weights == after.keys()
    for name in weights:
        one, two = before[name], after[name]
        assert one.dtype == two.dtype
        if "word_embeddings" in name or "output_layer" in name:
            one, two = one[:IDS], two[:IDS]
        assert torch.equal(as_bytes(one), as_bytes(two)), name
    assert torch.equal(logits_here(tmp_path / "back"), logits_here(folder))


@pytest.mark.parametrize("preset", ["te", "o1"])
def test_weights_of_other_formats_are_cast_as_their_gemms_cast_them(preset, convert, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": preset})
    convert("fp8lm", "hf-fp8", folder, tmp_path / "hf")
    weight = named_params(restored(folder))["decoder.layers.1.self_attention.linear_proj.weight"]
    found, operand = SafetensorsFolder(tmp_path / "hf"), weight.operand()
    name = "model.layers.1.self_attn.o_proj"
    assert torch.equal(as_bytes(found.read(f"{name}.weight")), operand.payload.view(-1))
    assert found.read(f"{name}.weight_scale").item() == 1 / operand.scale.item()


@pytest.mark.parametrize(("kind", "preset"), [("llama", "o3"), ("gpt_neox", "bf16")])
def test_a_run_starts_from_it(kind, preset, convert, run_distributed, tmp_path):
    """Under TP2 with SP: the master weights are those of the folder, in the preset's format."""
    folder = save_there(tmp_path / "hf", kind)
    convert("hf", "fp8lm", folder, tmp_path / "ck")
    sections = yaml.safe_load((tmp_path / "ck" / "model.yaml").read_text())
    sections["model"]["seq_length"] = 16
    config = build_config(
        {
            **sections,
            "precision": {"preset": preset},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1e-3},
            "data": {"mock_data": True},
            "checkpoint": {"pretrained": str(tmp_path / "ck")},
        }
    )
    run_distributed(save_again, 2, config, str(tmp_path / "started"))
    weights, started = contents(tmp_path / "ck"), contents(tmp_path / "started")
    fmt = format_by_name(config.precision.main_params_dtype)
    names = [name.removeprefix("optimizer.master.") for name in started if "master" in name]
    names = [name.removesuffix(".payload") for name in names if name.endswith(".payload")]
    assert len(names) > 10
    for name in names:
        master = KERNELS.quantize(values(weights, f"model.{name}"), fmt)
        expect(started, f"optimizer.master.{name}", master)
