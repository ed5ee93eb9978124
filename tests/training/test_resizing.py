"""Tables with other rows than in the checkpoint: another padding, more tokens, more positions."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import copy_checkpoint, differences, read_tensor, stored_tensors
from fp8lm.runtime.errors import InputError
from fp8lm.training.resizing import RowPlan, Vocabulary
from tests.training.runs import LLAMA, save_again

MODEL = LLAMA | {"hidden_size": 48, "num_attention_heads": 3, "ffn_hidden_size": 96}
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
POSITIONS = "embedding.position_embeddings.weight"
KINDS = ("model", "optimizer.master", "optimizer.exp_avg", "optimizer.exp_avg_sq")
TP3 = {"parallel": {"tensor_model_parallel_size": 3}}
SHORT = LLAMA | {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "position_embedding_type": "learned_absolute",
}
LONGER = {
    "model": SHORT | {"seq_length": 32},
    "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 200},
}


def tensor(folder, name):
    checkpoint = open_checkpoint(folder)
    return read_tensor(checkpoint, stored_tensors(checkpoint)[name])


@pytest.fixture
def config(tiny_config):
    def make(*changes, **checkpoint):
        folders = {key: str(value) for key, value in checkpoint.items() if key != "extend"}
        folders["extend_embeddings"] = checkpoint.get("extend", False)
        train = {"micro_batch_size": 1, "train_iters": 3, "eval_iters": 0}
        return tiny_config({"model": MODEL, "train": train}, *changes, {"checkpoint": folders})

    return make


@pytest.mark.slow
def test_padding_for_three_ranks_and_back(config, train_run, run_distributed, tmp_path):
    """64 tokens: 128 rows on one process, 384 on three."""
    one, three, back = (tmp_path / name for name in ("one", "three", "back"))
    train_run(config(save=one))
    run_distributed(save_again, 3, config(TP3, load=one), str(three), timeout=120)
    for name in TABLES:
        for kind in KINDS:
            stored = tensor(three, f"{kind}.{name}.payload").view(torch.uint8)
            assert torch.equal(
                stored[:128], tensor(one, f"{kind}.{name}.payload").view(torch.uint8)
            )
            assert len(stored) == 384 and not stored[128:].any()
            assert kind == "model" or stored[:64].any()
    assert not list(differences(open_checkpoint(one), open_checkpoint(three)))
    merged = copy_checkpoint(open_checkpoint(three), tmp_path / "merged", lambda name: True, {})
    assert not list(differences(open_checkpoint(one), open_checkpoint(merged)))
    shapes = [stored_tensors(open_checkpoint(place)) for place in (one, merged)]
    assert shapes[0] == shapes[1]
    run_distributed(save_again, 2, config(load=three), str(back), timeout=120)
    assert not list(differences(open_checkpoint(one), open_checkpoint(back)))


@pytest.mark.slow
def test_more_tokens_and_positions_by_key(config, train_run, run_distributed, tmp_path):
    short, longer = tmp_path / "short", tmp_path / "longer"
    train_run(config({"model": SHORT}, save=short))
    with pytest.raises(InputError, match=r"201 tokens, and the checkpoint has 64: set checkpoint."):
        train_run(config(LONGER, load=short))
    with pytest.raises(InputError, match=r"has 16 learned positions: set checkpoint.extend_emb"):
        train_run(config(LONGER, {"tokenizer": {"vocab_size": 63}}, load=short))
    run_distributed(
        save_again, 1, config(LONGER, load=short, extend=True), str(longer), timeout=120
    )
    rows = dict.fromkeys(TABLES, (64, 201)) | {POSITIONS: (16, 32)}
    for name, (old, new) in rows.items():
        for kind in KINDS:
            after = tensor(longer, f"{kind}.{name}.payload")
            before = tensor(short, f"{kind}.{name}.payload")[:old]
            assert torch.equal(after[:old].view(torch.uint8), before.view(torch.uint8))
            assert not after[new:].view(torch.uint8).any()
            assert after[old:new].view(torch.uint8).any() == ("exp_avg" not in kind)
        std = tensor(longer, f"model.{name}.payload")[old:new].float().std().item()
        assert std == pytest.approx(0.02, rel=0.1)
        master = tensor(longer, f"optimizer.master.{name}.payload")[old:new].float()
        scale = tensor(longer, f"optimizer.master.{name}.scale")
        compute = tensor(longer, f"model.{name}.payload")[old:new].float()
        assert torch.allclose(master / scale, compute, rtol=2**-8)
    for number, layout in enumerate(
        (
            {"tensor_model_parallel_size": 2},
            {"partition": "even"},
            {"pipeline_model_parallel_size": 2},
        )
    ):
        two, parallel = tmp_path / f"two {number}", {"parallel": layout}
        run_distributed(
            save_again, 2, config(LONGER, parallel, load=short, extend=True), str(two), timeout=120
        )
        assert not list(differences(open_checkpoint(longer), open_checkpoint(two))), layout


def test_fewer_positions_or_tokens_are_refused(config, train_run, tmp_path):
    train_run(config(LONGER, save=tmp_path))
    fewer = LONGER["model"] | {"seq_length": 16}
    with pytest.raises(InputError, match=r"set model.max_position_embeddings=32"):
        train_run(config(LONGER, {"model": fewer}, load=tmp_path, extend=True))
    with pytest.raises(InputError, match="64 tokens, and the checkpoint has 201"):
        train_run(config(LONGER, {"tokenizer": {"vocab_size": 63}}, load=tmp_path, extend=True))


@pytest.mark.parametrize(
    ("num_ids", "former", "stored", "rows", "extend", "plan"),
    [
        (100, 100, 128, 128, True, None),
        (100, 100, 128, 384, True, RowPlan(128)),
        (100, 100, 384, 128, False, RowPlan(128)),
        (120, 100, 128, 128, True, RowPlan(100, range(100, 120))),
        (130, 100, 128, 256, True, RowPlan(100, range(100, 130))),
        # A checkpoint that does not say: as many as would have been padded to its rows, or all.
        (100, None, 128, 384, False, RowPlan(128)),
        (200, None, 128, 256, True, RowPlan(128, range(128, 200))),
    ],
)
def test_what_is_kept(num_ids, former, stored, rows, extend, plan):
    assert Vocabulary(num_ids, former, 128).plan("w", stored, rows, extend) == plan
