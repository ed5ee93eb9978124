"""Arithmetic of a step against values worked out by hand; memory against what was allocated."""

from __future__ import annotations

import mmap
import time

import pytest
import torch

from fp8lm.config import ModelConfig, build_config
from fp8lm.training.flops import (
    BF16_PEAK,
    FP8_PEAK,
    layer_flops,
    peak_of,
    small_gemm_risk,
    throughput,
    training_flops,
)
from fp8lm.training.memory import memory_bytes

GPT = dict(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=128)


def test_gpt_by_hand():
    # Per layer: qkv 64*192 + proj 64*64 + mlp 2*64*256 = 12288 + 4096 + 32768 = 49152.
    # Dense: 128 tokens * (2*49152 + 64*256) = 128 * 114688 = 14680064.
    # Attention: 2 layers * 64 * 128^2 = 2097152.
    assert training_flops(ModelConfig(**GPT), 256, [128]) == 6 * (14680064 + 2097152)


def test_llama_by_hand():
    # 4 query heads and 2 groups of 16 channels: q = 64, k = 32; SwiGLU with ffn 128.
    # Per layer: 64*(64 + 2*32) + 64*64 + 3*64*128 = 8192 + 4096 + 24576 = 36864.
    # 40 tokens in sequences of 30 and 10: 40 * (2*36864 + 64*256) = 40 * 90112 = 3604480.
    # Attention: 2 layers * 64 * (900 + 100) = 128000.
    model = ModelConfig(**GPT, num_query_groups=2, swiglu=True, ffn_hidden_size=128)
    assert training_flops(model, 256, [30, 10]) == 6 * (3604480 + 128000)


def test_gpt3_175b_needs_six_flops_per_parameter_and_token():
    # 175e9 parameters, 2048 tokens; attention adds 6*96*12288*2048^2, two percent.
    model = ModelConfig(num_layers=96, hidden_size=12288, num_attention_heads=96, seq_length=2048)
    assert training_flops(model, 51200, [2048]) == pytest.approx(6 * 175e9 * 2048, rel=0.02)


def test_wide_heads_count_by_their_projection():
    narrow, wide = ModelConfig(**GPT), ModelConfig(**GPT, kv_channels=32)
    # q and k double from 64 to 128: 64*(3*64) + 64*64 more dense, 64 more attention, per layer.
    more = 2 * (128 * (64 * 192 + 64 * 64) + 64 * 128**2)
    difference = training_flops(wide, 256, [128]) - training_flops(narrow, 256, [128])
    assert difference == 6 * more


def sized(preset, hidden, ranks=1):
    """Micro-batches of two samples of 1024 tokens."""
    parallel = dict(tensor_model_parallel_size=ranks)
    model = dict(num_layers=2, hidden_size=hidden, num_attention_heads=8, seq_length=1024)
    return build_config(
        {
            "model": model,
            "parallel": parallel,
            "precision": {"preset": preset},
            "train": {"micro_batch_size": 2, "global_batch_size": 2, "train_iters": 1},
            "optimizer": {"lr": 1e-3},
            "data": {"mock_data": True},
            "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 99},
        }
    )


def test_gemms_too_small_for_fp8():
    # 6 * 2048 tokens * 12 * 1024^2 = 0.155 TFLOP; two ranks have half each.
    assert layer_flops(sized("o3", 1024, 2)) == 6 * 2048 * 12 * 1024**2 / 2
    assert small_gemm_risk(sized("o3", 1024)) is None
    assert small_gemm_risk(sized("bf16", 1024, 2)) is None
    assert "0.077 TFLOP" in small_gemm_risk(sized("o3", 1024, 2))


def test_utilization_says_of_what():
    assert throughput(8 * 395.6e12 * 2.0, seconds=2.0, world_size=8) == pytest.approx(395.6)
    assert BF16_PEAK.utilization(395.6e12) == pytest.approx(0.4)
    assert FP8_PEAK.utilization(395.8e12) == pytest.approx(0.2)
    assert str(FP8_PEAK) == "1979 TFLOPS, FP8 dense on H100 and H200"


@pytest.mark.parametrize(
    ("gemm", "device", "peak"),
    [("fp8", "cuda", FP8_PEAK), ("bf16", "cuda", BF16_PEAK), ("fp8", "cpu", None)],
)
def test_peak_of(gemm, device, peak):
    assert peak_of(gemm, torch.device(device)) == peak


def test_memory_counts_bytes():
    # Mapped, not allocated: an allocator may hand out pages that are counted already.
    num_bytes = 64 << 20
    before = memory_bytes(torch.device("cpu"))
    with mmap.mmap(-1, num_bytes) as held:
        held[:] = bytes([1]) * num_bytes
        deadline = time.monotonic() + 30  # a kernel may count with a delay
        while (after := memory_bytes(torch.device("cpu")))["memory/rss"] < (
            before["memory/rss"] + 0.75 * num_bytes
        ):
            assert time.monotonic() < deadline, (before, after)
            time.sleep(0.05)
    assert after["memory/rss_peak"] >= 0.95 * after["memory/rss"]
    assert set(after) == {"memory/rss", "memory/rss_peak"}
