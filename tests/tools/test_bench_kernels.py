"""Every operation is timed, and its bytes and operations are those of its shape."""

from __future__ import annotations

import json

import pytest

SMALL = ("--device", "cpu", "--hidden-size", 32, "--ffn-hidden-size", 64, "--copy-mib", 1)


def test_rows(run_tool, tmp_path):
    output = tmp_path / "kernels.json"
    options = (*SMALL, "--tokens", 16, 48, "--seconds", 1e-4, "--json", output)
    assert run_tool("bench_kernels", *options) == 0
    rows = json.loads(output.read_text())["rows"]
    assert all(row["microseconds"] > 0 for row in rows)
    assert {row["backend"] for row in rows} >= {"torch", "eager"}
    rows = [row for row in rows if row["backend"] != "compiled"]
    named = {(row["name"], tuple(row["shape"])): row for row in rows}
    assert len(named) == len(rows)
    assert named["copy", (1 << 20,)]["bytes_moved"] == 2 << 20
    # x [48,32] times w [96,32]: queries, keys and values.
    assert named["gemm forward qkv fp8 fast", (48, 96, 32)]["flops"] == 2 * 48 * 96 * 32
    assert named["gemm wgrad fc1 bf16", (64, 32, 16)]["flops"] == 2 * 64 * 32 * 16
    assert named["cast and transpose to e5m2", (48, 64)]["bytes_moved"] == 4 * 48 * 64
    # Twice two bytes of the term and one of the sum, and the new sum; then in blocks of 32.
    assert named["accumulate in fp8_e4m3", (64, 32)]["bytes_moved"] == 7 * 64 * 32 + 8
    assert named["accumulate in fp8_e2m5", (64, 32)]["bytes_moved"] == 4 * 64 * 32 + 8 * 64
    # A gradient of one byte; master 2, m 1 and v 2, read and written; the weight, written.
    assert named["adam o3", (64, 32)]["bytes_moved"] == (1 + 2 * 5 + 1) * 64 * 32
    shares = [row["share"] for row in rows if row["bytes_moved"]]
    assert all(share > 0 for share in shares)


@pytest.mark.parametrize("sizes", [("--hidden-size", 40), ("--tokens", 0), ("--tokens", 24)])
def test_sizes_are_those_of_fp8_gemms(sizes, run_tool):
    assert run_tool("bench_kernels", *sizes, "--device", "cpu") == 2
