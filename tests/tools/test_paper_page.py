"""Every number of docs/paper.md that a file of docs/benchmarks has is that of the file."""

from __future__ import annotations

import json

import pytest

from tests.launch.conftest import ROOT

BENCHMARKS = ROOT / "docs/benchmarks"
OF_LAYERS = {
    "attention, qkv": "self_attention.linear_qkv",
    "attention, projection": "self_attention.linear_proj",
    "MLP, fc1": "mlp.linear_fc1",
    "MLP, fc2": "mlp.linear_fc2",
}
OF_REDUCTIONS = {
    "pre-scaling": "FP8 ring, pre-scaling",
    "post-scaling": "FP8 ring, post-scaling",
    "automatic scaling (`fp8_sum`)": "FP8 ring, automatic scaling",
    "sums in fp32 (`fp32_accumulate`, the default)": "fp32_accumulate",
    "the same in two hops, nodes of 8": "hierarchical",
    "ring in BF16": "BF16 ring",
}


@pytest.fixture(scope="module")
def rows():
    """The rows of all tables, as lists of cells."""
    lines = (ROOT / "docs/paper.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def numbers(name):
    return json.loads((BENCHMARKS / name).read_text())


def row_of(rows, first, width):
    (found,) = [row for row in rows if row[0] == first and len(row) == width]
    return found


def test_tables_5_7_and_8(rows):
    tables = numbers("paper_tables.json")
    shown = [row[2:] for row in rows if len(row) == 9]
    expected = [
        [
            str(row["micro-batch"]),
            str(row["GB, paper"]),
            f"{row['GB, most']:.1f}",
            str(row["weights, paper"]),
            f"{row['weights']:.1f}",
            str(row["samples/s, paper"]),
            f"{row['samples/s']:.1f}",
        ]
        for row in tables["table5"]
    ]
    assert shown[1:] == [["---"] * 7, *expected]
    table8 = [row[4:] for row in rows if len(row) == 6 and row[1] in ("BF16", "TE", "FP8")]
    with_least = {}
    for row in tables["table5"]:  # of equal precisions the first, which Table 8 has
        key = row["model"], row["precision"]
        with_least.setdefault(key, [f"{row['GB, least']:.2f}", f"{row['GB, most']:.2f}"])
    assert table8 == list(with_least.values())
    of_activations = [row for row in rows if len(row) == 6 and row[1] in ("4.7", "5.9")]
    for row in tables["table7"]:
        cells = [f"{row[key]:.2f}" for key in ("BF16", "FP8, inputs only", "FP8 here")]
        (found,) = [each[2:] for each in of_activations if each[0] == row["model"].upper()]
        assert found == [cells[0], str(row["FP8, paper"]), *cells[1:]]


def test_table_6(rows):
    for name, row in numbers("table6.json").items():
        cells = row_of(rows, name.replace("-stochastic", ", stochastic"), 5)
        gap = f"{row['gap %']:+.2f} ± {row['gap % +-']:.2f} %" if row["gap % +-"] else ""
        assert cells[3:] == [f"{row['validation loss']:.4f}", gap]
        assert len(row["validation losses"]) == 3


def test_figure_7(rows):
    results = numbers("reduction_blocks.json")
    for shown, kind in OF_REDUCTIONS.items():
        expected = []
        for moment in ("early", "late"):
            quality = results[moment]["replicas"]["64"][kind]
            expected.append(f"{quality['snr']:.1f}")
            for key in ("underflow", "overflow"):
                share = quality[key]
                expected.append(f"{share:.3%}".replace("%", " %") if share else "0")
        assert row_of(rows, shown, 7)[1:] == expected


def test_layers(rows):
    records = {
        (record["place"], record["kind"], record["statistic"]): record["by_layer"]
        for record in numbers("layers.json")
        if record["run"] == "o3"
    }
    for shown, where in OF_LAYERS.items():
        place = next(number for number, row in enumerate(rows) if row[0] == shown)
        for row, kind in zip(rows[place : place + 2], ("input", "grad_output"), strict=True):
            snr, underflow, kurtosis, zeros = (
                sum(values) / len(values)
                for values in (
                    records[where, kind, name]
                    for name in ("snr", "underflow", "kurtosis", "sparsity")
                )
            )
            shares = [f"{share:.3%}".replace("%", " %") for share in (underflow, zeros)]
            assert row[2:] == [f"{snr:.1f}", shares[0], f"{kurtosis:.3g}", shares[1]]
