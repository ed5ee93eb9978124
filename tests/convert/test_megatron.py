"""Megatron-core's torch_dist checkpoints: its own loader and its own model, both ways."""

from __future__ import annotations

import contextlib
import os
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from fp8lm.convert import megatron
from fp8lm.runtime.errors import InputError
from tests.convert.models import FP32, IDS, LLAMA, SEQUENCE, SHAPES, save_model
from tests.training.contents import contents, values

pytestmark = pytest.mark.slow

MODELS = {
    "llama": LLAMA,
    "qwen3": SHAPES["qwen3"] | {"add_qkv_bias": True},
    "gpt": {},
    "learned": SHAPES["gpt2"],
}


@pytest.fixture
def process_group():
    """What megatron-core's model and loader ask for."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def their_model(model):
    """A GPTModel of megatron-core's own layers, of the same shape."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    gated, kind = model.get("swiglu", False), model.get("normalization", "LayerNorm")
    qk_layernorm = model.get("qk_layernorm", False)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=model.get("num_query_groups", 4),
        kv_channels=model.get("kv_channels", 16),
        ffn_hidden_size=model.get("ffn_hidden_size", 256),
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=not model.get("disable_bias_linear", False),
        add_qkv_bias=model.get("add_qkv_bias", False),
        normalization=kind,
        qk_layernorm=qk_layernorm,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization=kind),
        256,
        SEQUENCE,
        share_embeddings_and_output_weights=not model.get("untie_embeddings_and_output_weights"),
        position_embedding_type=model.get("position_embedding_type", "rope"),
    )


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(theirs, folder):
    """Megatron-core's parameters are the values of a checkpoint, name by name."""
    own = contents(folder)
    names = {name[6:-8] for name in own if name.startswith("model.") and name.endswith("payload")}
    assert names == theirs.keys() and len(names) > 10
    for name in names:
        master = f"optimizer.master.{name}"
        kind = master if f"{master}.payload" in own else f"model.{name}"
        expected = values(own, kind).reshape(-1, *theirs[name].shape[1:])
        rows = IDS if "word_embeddings" in name or "output_layer" in name else None
        assert torch.equal(theirs[name][:rows], expected[:rows]), name


@pytest.mark.parametrize("shape", MODELS)
def test_export_is_read_by_its_own_loader(shape, convert, process_group, tmp_path):
    from megatron.core import dist_checkpointing

    folder = save_model(tmp_path / "ck", MODELS[shape], {"preset": "o3"})
    convert("fp8lm", "megatron", folder, tmp_path / "mc", "--dtype", "fp32")
    model = their_model(MODELS[shape])
    wanted = {k: v for k, v in model.sharded_state_dict().items() if "_extra_state" not in k}
    place = tmp_path / "mc" / "iter_0000001"
    loaded = dist_checkpointing.load({"model": wanted}, str(place))
    model.load_state_dict(loaded["model"], strict=False)
    same_weights(weights_of(model), folder)
    args = loaded["args"]
    assert (args.num_layers, args.hidden_size, args.padded_vocab_size) == (2, 64, 256)
    assert (tmp_path / "mc" / "latest_checkpointed_iteration.txt").read_text() == "1\n"


def write_config(path, model):
    sections = {
        "model": {
            **{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
            **{"seq_length": SEQUENCE, **model},
        },
        "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
        "optimizer": {"lr": 1e-3},
        "data": {"mock_data": True},
        "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": IDS - 1},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize("shape", MODELS)
def test_import_of_what_it_has_written(shape, convert, process_group, tmp_path):
    from megatron.core import dist_checkpointing

    model = their_model(MODELS[shape])
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    place = tmp_path / "mc" / "iter_0000007"
    place.mkdir(parents=True)
    (tmp_path / "mc" / "latest_checkpointed_iteration.txt").write_text("7")
    without_cuda = [
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
    ]
    with contextlib.ExitStack() as stack:
        for patch in without_cuda:
            stack.enter_context(patch)
        dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(place))
    config = write_config(tmp_path / "model.yaml", MODELS[shape])
    convert("megatron", "fp8lm", tmp_path / "mc", tmp_path / "ck", "--config", config)
    same_weights(weights_of(model), tmp_path / "ck")


def test_there_and_back_is_every_byte(convert, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, FP32)
    convert("fp8lm", "megatron", folder, tmp_path / "mc", "--dtype", "fp32")
    config = write_config(tmp_path / "model.yaml", LLAMA)
    given = "--config", config, "--weights-only"
    convert("megatron", "fp8lm", tmp_path / "mc", tmp_path / "back", *given)
    before, after = contents(folder), contents(tmp_path / "back")
    assert after.keys() == {name for name in before if name.startswith("model.")}
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_refusals(run, tmp_path):
    folder = save_model(tmp_path / "ck", LLAMA, FP32)
    config = write_config(tmp_path / "model.yaml", LLAMA | {"qk_layernorm": True})
    out, mc = tmp_path / "out", tmp_path / "mc"
    assert run("fp8lm", "megatron", folder, mc)[0] == 0
    code, said = run("megatron", "fp8lm", mc, out)
    assert code == 2 and "--config FILE" in said
    code, said = run("megatron", "fp8lm", mc, out, "--config", config)
    assert code == 2 and "no tensor decoder.layers.self_attention.q_layernorm.weight" in said
    write_config(config, LLAMA | {"ffn_hidden_size": 48})
    code, said = run("megatron", "fp8lm", mc, out, "--config", config)
    assert code == 2 and "linear_fc1.weight has" in said
    code, said = run("megatron", "fp8lm", folder / "nothing", out, "--config", config)
    assert code == 2 and "no torch_dist checkpoint" in said
    neox = save_model(tmp_path / "neox", SHAPES["neox"], FP32)
    code, said = run("fp8lm", "megatron", neox, out)
    assert code == 2 and "model.use_parallel_residual" in said
    assert not out.exists()


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_metadata_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match="refused to load"):
        megatron.read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(InputError, match="is damaged"):
        megatron.read_metadata(tmp_path)
    assert not (tmp_path / "attacked").exists()
