"""State dicts of TransformerEngine and MS-AMP, pickled as their classes do it, come in."""

from __future__ import annotations

import argparse
import os
import random
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from fp8lm.convert.megatron_names import key_of
from fp8lm.convert.torch_saved import read_state_dict
from fp8lm.runtime.errors import InputError
from tests.convert.models import IDS, LLAMA, save_model
from tests.convert.test_megatron import write_config
from tests.training.contents import contents, values

E4M3, E5M2 = 7, 8  # of TransformerEngine's enum


class Float8Tensor:
    """Pickled as `transformer_engine/pytorch/tensor/float8_tensor.py` does."""

    def __init__(self, data, fp8_dtype, fp8_scale_inv, dtype=torch.bfloat16, shape=None):
        self.arguments = data, fp8_dtype, fp8_scale_inv, dtype, data.shape

    @classmethod
    def _make_in_reduce_ex(cls, *arguments):
        return cls(*arguments)

    def __reduce_ex__(self, protocol):
        return Float8Tensor._make_in_reduce_ex, self.arguments


class DType:
    """An enum of pybind11, which pickles its number."""

    def __init__(self, number):
        self.number = number

    def __getstate__(self):
        return self.number


class ScalingTensor:
    """Pickled as `msamp/common/tensor/tensor.py` does."""

    def __init__(self, value, meta):
        self.value, self.meta, self._requires_grad = value, meta, True


class ScalingMeta:
    def __init__(self, qtype, scale_inv):
        self.qtype, self.scale_inv, self.scale = qtype, scale_inv, scale_inv.reciprocal()
        self.amax, self.window_size, self.locked = torch.zeros(1), 1, False


@dataclass
class QType:
    name: str
    value: int


PLACES = {
    Float8Tensor: "transformer_engine.pytorch.tensor.float8_tensor",
    DType: "transformer_engine_torch",
    ScalingTensor: "msamp.common.tensor.tensor",
    ScalingMeta: "msamp.common.tensor.meta",
    QType: "msamp.common.dtype.dtypes",
}
QType.__name__ = QType.__qualname__ = "DType"
for _kind, _module in PLACES.items():
    _kind.__module__ = _module


@pytest.fixture
def save(monkeypatch):
    """torch.save while those programs' modules are there."""

    def save_file(content, path):
        with monkeypatch.context() as patch:
            for kind, module in PLACES.items():
                parts = module.split(".")
                for count in range(1, len(parts) + 1):
                    name = ".".join(parts[:count])
                    if name not in sys.modules:
                        patch.setitem(sys.modules, name, types.ModuleType(name))
                setattr(sys.modules[module], kind.__name__, kind)
            torch.save(content, path)

    return save_file


def te_weight(codes, scale):
    return Float8Tensor(codes, DType(E4M3), scale.reciprocal().view(1))


def msamp_weight(codes, scale):
    return ScalingTensor(codes, ScalingMeta(QType("kFloat8E4M3", 5), scale.reciprocal()))


def megatron_core(param):
    key, layer = key_of(param)
    return key if layer is None else key.replace("layers.", f"layers.{layer}.")


def before_core(param):
    """The names that MS-AMP's patch of Megatron-LM has."""
    for new, old in (
        ("decoder", "encoder"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
        ("pre_mlp_layernorm", "post_attention_norm"),
        ("input_layernorm", "input_norm"),
        ("final_layernorm", "final_norm"),
    ):
        param = param.replace(f"{new}.", f"{old}.")
    return f"language_model.{param}"


def state_dict(folder, name_of, weight_of, factor=1.0):
    """The model parameters of a checkpoint as such a program holds them."""
    own = contents(folder)
    found = {}
    for key in own:
        if not key.startswith("model.") or not key.endswith(".payload"):
            continue
        param, scale = key[6:-8], own.get(key.replace("payload", "scale"))
        payload = own[key].reshape(-1, *own[key].shape[2:]) if own[key].ndim == 3 else own[key]
        if scale is not None:
            payload = weight_of(payload.view(torch.uint8), scale * factor)
        found[name_of(param)] = payload
    return found


def around(model):
    """What Megatron saves beside a model, and what this program has no use for."""
    return {
        "args": argparse.Namespace(num_layers=2, dtype=torch.bfloat16),
        "rng_state": [{"random": random.getstate(), "set": {1, 2}}],
        "checkpoint_version": 3.0,
        "model": model,
    }


@pytest.mark.parametrize(
    ("name_of", "weight_of"), [(megatron_core, te_weight), (before_core, msamp_weight)]
)
def test_codes_and_scales_come_in_as_they_are(save, convert, name_of, weight_of, tmp_path):
    model, folder = LLAMA | {"num_layers": 2}, tmp_path / "ck"
    save_model(folder, model, {"preset": "o3"})
    place = tmp_path / "te" / "iter_0000005" / "mp_rank_00"
    place.mkdir(parents=True)
    (tmp_path / "te" / "latest_checkpointed_iteration.txt").write_text("5")
    held = state_dict(folder, name_of, weight_of)
    held["decoder.layers.0.self_attention._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    save(around(held), place / "model_optim_rng.pt")
    config = write_config(tmp_path / "model.yaml", model)
    said = convert("megatron", "fp8lm", tmp_path / "te", tmp_path / "in", "--config", config)
    assert "FP8 codes and scales as they are, without optimizer states" in said
    before, after = contents(folder), contents(tmp_path / "in")
    assert after.keys() == {name for name in before if name.startswith("model.")}
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_other_scales_are_multiplied_out(save, convert, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": "o3"})
    held = state_dict(folder, megatron_core, te_weight, factor=0.7)
    save(held, tmp_path / "model.pt")
    config = write_config(tmp_path / "model.yaml", LLAMA)
    path, out = tmp_path / "model.pt", tmp_path / "in"
    said = convert("megatron", "fp8lm", path, out, "--config", config, "--dtype", "fp32")
    assert "weights: fp32, dequantized" in said
    before, after = contents(folder), contents(out)
    for param in ("decoder.layers.1.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"):
        codes = before[f"model.{param}.payload"]
        expected = codes.float()
        if (scale := before.get(f"model.{param}.scale")) is not None:
            codes = codes.view(torch.float8_e4m3fn)
            expected = codes.float() * (scale * 0.7).reciprocal()
        found = values(after, f"model.{param}")[:IDS]
        assert torch.equal(found.flatten(), expected[:IDS].flatten())


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Attack(), "c": [Attack()]}, "model.pt")
    assert read_state_dict(tmp_path / "model.pt").keys() == {"a"}
    assert not (tmp_path / "attacked").exists()


def broken(kind, tmp_path):
    path = tmp_path / f"{kind}.pt"
    codes, one = torch.zeros(4, 4, dtype=torch.uint8), torch.ones(())
    match kind:
        case "text":
            path.write_text("no zip")
        case "truncated":
            torch.save({"model": {"a": torch.ones(1000)}}, path)
            path.write_bytes(path.read_bytes()[:-600])
        case "script":
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
        case "list":
            torch.save([1], path)
        case "integers":
            torch.save({"a": torch.ones(2, dtype=torch.int64)}, path)
        case "e5m2":
            return path, {"a": Float8Tensor(codes, DType(E5M2), one)}
        case "rows":
            return path, {"a": Float8Tensor(codes, DType(E4M3), torch.ones(4))}
        case "infinite":
            return path, {"a": Float8Tensor(codes, DType(E4M3), one * torch.inf)}
        case "nothing":
            return path, {"a": ScalingTensor(None, None)}
    return path, None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("text", "no file of torch.save"),
        ("truncated", "damaged"),
        ("script", "TorchScript program"),
        ("list", "no state dict"),
        ("integers", "a is in a format that is not read"),
        ("e5m2", "a is in a format that is not read"),
        ("rows", "a is in a format that is not read"),
        ("infinite", "scale of a is inf"),
        ("nothing", "a is in a format that is not read"),
    ],
)
def test_files_that_cannot_be_read(save, kind, complaint, tmp_path):
    path, content = broken(kind, tmp_path)
    if content is not None:
        save(content, path)
    with pytest.raises(InputError, match=complaint):
        read_state_dict(path)


def test_models_that_do_not_fit(save, run, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": "o3"})
    held = state_dict(folder, megatron_core, te_weight)
    save(held, tmp_path / "model.pt")
    out = tmp_path / "out"

    def refused(model, path=tmp_path / "model.pt"):
        config = write_config(tmp_path / "model.yaml", model)
        code, said = run("megatron", "fp8lm", path, out, "--config", config)
        assert code == 2 and not out.exists()
        return said

    assert "no tensor decoder.layers.2" in refused(LLAMA | {"num_layers": 3})
    assert "has no place in the model" in refused(LLAMA | {"num_layers": 1})
    assert "has shape" in refused(LLAMA | {"ffn_hidden_size": 48})
    for rank in range(2):
        (tmp_path / "two" / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save({}, tmp_path / "two" / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    assert "of 2 model-parallel ranks" in refused(LLAMA, tmp_path / "two")
