"""FP8 exports: compressed-tensors reads them on a CPU, and what others have written is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8lm.checkpoint import open_checkpoint
from fp8lm.comm.groups import process_groups
from fp8lm.config import CheckpointConfig, LoggingConfig, build_config
from fp8lm.convert.compressed_tensors import from_weight_scale, to_weight_scale
from fp8lm.convert.safetensors_files import SafetensorsFolder
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from tests.convert.models import (
    CPU,
    FP32,
    LLAMA,
    SHAPES,
    as_bytes,
    error,
    logits_here,
    logits_there,
    save_model,
    tokens,
)
from tests.generate.models import save_model as save_trained
from tests.training.contents import contents, values

pytestmark = pytest.mark.slow


@pytest.fixture
def exported(convert, tmp_path):
    """`exported(model)`: a checkpoint of FP8 weights, and its export."""

    def make(model=LLAMA, **precision):
        folder = save_model(tmp_path / "ck", model, {"preset": "o3", **precision})
        said = convert("fp8lm", "hf-fp8", folder, tmp_path / "hf")
        assert "FP8 codes and scales as trained" in said
        return folder, tmp_path / "hf"

    return make


PARTS = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.down_proj": "mlp.linear_fc2",
}


@pytest.mark.parametrize("keys", [{}, {"first_last_layers_bf16": True}], ids=["all", "inner"])
def test_its_own_loader_has_the_trained_values_bit_for_bit(keys, exported):
    from transformers import AutoModelForCausalLM

    folder, there = exported(LLAMA | {"num_layers": 3}, **keys)
    model = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
    with torch.no_grad():
        result = model(tokens()).logits
    trained, weights = contents(folder), dict(model.named_parameters())  # decompressed by forward
    for layer in range(3):
        prefix, own = f"model.layers.{layer}", f"model.decoder.layers.{layer}"
        for name, param in PARTS.items():
            expected = values(trained, f"{own}.{param}.weight")
            assert torch.equal(weights[f"{prefix}.{name}.weight"], expected)
        gate, up = values(trained, f"{own}.mlp.linear_fc1.weight")
        assert torch.equal(weights[f"{prefix}.mlp.gate_proj.weight"], gate)
        assert torch.equal(weights[f"{prefix}.mlp.up_proj.weight"], up)
        quantized = f"{prefix}.mlp.up_proj.weight_scale" in weights
        assert quantized == (layer == 1 or not keys)
    # Activations are cast per token there and per tensor here, E4M3's 2^-4 each: about 19 dB.
    assert error(result, logits_here(folder)) < 10 ** (-15 / 20)


@pytest.mark.parametrize("precision", ["te", "te_margin", "unit"])
def test_codes_are_those_of_the_trainings_gemms(precision, convert, tmp_path):
    """Whatever the scale comes from: the weight, its history, or its size."""
    folder, layer = save_trained(tmp_path / "ck", "llama", precision), "decoder.layers.0"
    convert("fp8lm", "hf-fp8", folder, tmp_path / "hf")
    config = build_config(open_checkpoint(str(folder)).common["config"])
    run = config.model_copy(
        update={"checkpoint": CheckpointConfig(load=str(folder)), "logging": LoggingConfig()}
    )
    with process_groups(CPU) as groups:
        trainer = build_trainer(build(run, groups, CPU))
        trainer.load()
        weights = trainer.run.weights
        operands = {name: weights[f"{layer}.{PARTS[name]}.weight"].operand() for name in PARTS}
    exported = SafetensorsFolder(tmp_path / "hf")
    for name, operand in operands.items():
        codes = exported.read(f"model.layers.0.{name}.weight")
        assert torch.equal(as_bytes(codes), as_bytes(operand.payload))
        scale = exported.read(f"model.layers.0.{name}.weight_scale")
        assert scale == operand.scale.reciprocal()


def test_delayed_scaling_needs_its_histories(run, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": "te_delayed"})  # without any
    code, said = run("fp8lm", "hf-fp8", folder, tmp_path / "out")
    assert code == 2 and "scaling.amax_history" in said and "--to hf" in said


@pytest.mark.parametrize("shape", ["llama", "qwen3", "neox"])
def test_dequantized_logits_are_those_of_the_values_here(shape, exported, convert, tmp_path):
    from transformers.utils.quantization_config import CompressedTensorsConfig

    _, there = exported(SHAPES[shape])
    keys = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    convert("hf", "fp8lm", there, tmp_path / "values", "--dtype", "fp32")
    assert error(logits_there(there, **keys), logits_here(tmp_path / "values")) < 1e-5


def test_its_own_loader_leaves_the_head_of_neox_alone(exported):
    from transformers import AutoModelForCausalLM

    folder, there = exported(SHAPES["neox"])
    model = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
    assert not hasattr(model.lm_head, "weight_scale")
    head = values(contents(folder), "model.output_layer.weight")[: len(model.lm_head.weight)]
    assert torch.equal(model.lm_head.weight, head)
    with torch.no_grad():
        assert error(model(tokens()).logits, logits_here(folder)) < 10 ** (-15 / 20)


def test_scales_of_others_are_multiplied_in(exported, convert, tmp_path):
    """Scales that are no powers of two, of each channel, or not shared: values, not codes."""
    _, there = exported()
    tensors = load_file(there / "model.safetensors")
    q, o = (f"model.layers.0.self_attn.{name}_proj.weight_scale" for name in "qo")
    tensors[q] = tensors[q] * 0.3
    tensors[o] = torch.rand(tensors[o.replace("_scale", "")].shape[0], 1)
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    said = convert("hf", "fp8lm", there, tmp_path / "back", "--dtype", "fp32")
    assert "dequantized" in said
    convert("fp8lm", "hf", tmp_path / "back", tmp_path / "values", "--dtype", "fp32")
    result = SafetensorsFolder(tmp_path / "values")
    for name in (q, o):
        weight = name.replace("_scale", "")
        assert torch.equal(result.read(weight), tensors[weight].float() * tensors[name])


SCALED = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (SCALED + "_scale", torch.tensor([float("nan")]), "not finite and above 0"),
        (SCALED + "_scale", torch.zeros(1), "not finite and above 0"),
        (SCALED + "_scale", -torch.ones(64, 1), "not finite and above 0"),
        (SCALED + "_scale", torch.ones(63, 1), "has shape [63, 1]"),
        (SCALED, torch.ones(64, 96, dtype=torch.bfloat16), "torch.bfloat16 and has a weight_scale"),
        (None, None, "has no quantization_config, and model.layers.0."),
    ],
)
def test_codes_that_no_scale_tells_the_values_of(name, value, says, exported, run, tmp_path):
    _, there = exported()
    if name is None:
        config = json.loads((there / "config.json").read_text())
        del config["quantization_config"]
        (there / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(there / "model.safetensors") | {name: value}
        save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    code, said = run("hf", "fp8lm", there, tmp_path / "back")
    assert code == 2 and says in said.splitlines()[-1], said
    assert not list(tmp_path.glob("*back*"))


@pytest.mark.parametrize("exponent", [-127, -126, 0, 127])
def test_scales_come_back_where_fp32_holds_their_reciprocal(exponent):
    weight_scale = torch.tensor([2.0**exponent])
    scale = from_weight_scale(weight_scale)
    assert scale is not None and torch.equal(to_weight_scale(scale), weight_scale)
    assert from_weight_scale(torch.tensor([2.0**-128])) is None


def test_what_was_not_trained_in_fp8_is_refused(run, tmp_path):
    plain = save_model(tmp_path / "plain", LLAMA, FP32)
    code, said = run("fp8lm", "hf-fp8", plain, tmp_path / "out")
    assert code == 2 and "precision.gemm = fp32" in said
    blocks = save_model(tmp_path / "blocks", LLAMA, {"preset": "te", "scaling": {"weight": "row"}})
    code, said = run("fp8lm", "hf-fp8", blocks, tmp_path / "out")
    assert code == 2 and "scales per row" in said
    gpt2 = save_model(tmp_path / "gpt2", SHAPES["gpt2"], {"preset": "o3"})
    code, said = run("fp8lm", "hf-fp8", gpt2, tmp_path / "out")
    assert code == 2 and "Conv1D" in said


@pytest.mark.parametrize(
    "change",
    [{"quant_method": "gptq"}, {"format": "pack-quantized"}],
)
def test_other_quantizations_are_refused(change, exported, run, tmp_path):
    _, there = exported()
    config = json.loads((there / "config.json").read_text())
    config["quantization_config"] |= change
    (there / "config.json").write_text(json.dumps(config))
    code, said = run("hf", "fp8lm", there, tmp_path / "back")
    assert code == 2 and "quantization_config" in said
    assert not (tmp_path / "back").exists()
