"""tools/bench_generate.py: its numbers belong together, and no more memory is held than it says."""

from __future__ import annotations

import json

import pytest

from fp8lm.training.memory import live_tensor_bytes
from tests.generate.models import loaded, save_model


def test_every_way_is_measured(run_tool, tmp_path, capfd):
    save_model(tmp_path / "ck", "llama", "te")
    sizes = "--batch-sizes", "1,2", "--prompt-tokens", 8, "--max-new-tokens", 3, "--repeats", 1
    output = tmp_path / "bench.json"
    assert run_tool("bench_generate", "--load", tmp_path / "ck", *sizes, "--output", output) == 0
    facts = json.loads(output.read_text())
    rows = facts["results"]
    ways = ["cache", "fp8 cache", "no cache"]
    assert [(row["batch"], row["way"]) for row in rows] == [
        (n, way) for n in (1, 2) for way in ways
    ]
    for row in rows:
        read = row["prompt_tokens_per_s"] * row["first_token_s"]
        assert read == pytest.approx(8 * row["batch"])
        assert row["new_tokens_per_s"] * row["token_s"] == pytest.approx(row["batch"])
    # 2 layers of keys and values, 11 slots and one, 2 groups of 16 elements and a scale.
    assert rows[1]["cache_bytes"] == 2 * 2 * 12 * 2 * (16 + 4)
    assert rows[0]["cache_bytes"] == 2 * 2 * 12 * 2 * (2 * 16)
    sizes = "--prompt-tokens", 60, "--max-new-tokens", 5
    assert run_tool("bench_generate", "--load", tmp_path / "ck", *sizes) == 2
    assert "context of 64" in capfd.readouterr().err


def test_weights_are_all_that_is_held(tmp_path):
    """Neither gradients nor optimizer states, in the bytes of all tensors that are alive."""
    folder = save_model(tmp_path / "ck", "llama", "o3")
    before = live_tensor_bytes()
    with loaded(folder) as model:
        held = live_tensor_bytes() - before
        tables = sum(table.nbytes for table in model.chunks[0].rope)
        assert model.weight_bytes + tables <= held < model.weight_bytes + tables + 2048
