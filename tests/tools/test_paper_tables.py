"""FP8-LM's tables from the planner: what is held to within 5 % of the paper."""

from __future__ import annotations

import json

import pytest

from fp8lm.planner.tracing.roofline import Hardware
from tests.launch.conftest import ROOT

LIMIT = 5.0  # percent


@pytest.fixture(scope="module")
def h100():
    return Hardware.find("h100")


@pytest.mark.slow
def test_memory_and_weights_of_7b_in_bf16(tool, h100):
    tables = tool("paper_tables")
    row = tables.table5(tables.PAPER[0], h100)
    assert (row["model"], row["precision"]) == ("7b", "BF16")
    assert abs(row["off, %"]) < LIMIT and abs(row["weights off, %"]) < LIMIT


def test_moments_of_rlhf_shrink_as_in_the_paper(tool):
    rows = {row[""]: row for row in tool("paper_tables").rlhf()}
    assert abs(rows["moments"]["change, %"] - rows["moments"]["paper, %"]) < 1.0
    assert rows["all"]["change, %"] < -55


@pytest.mark.slow
def test_activations_of_13b(tool, h100):
    volumes = tool("paper_tables").table7("13b", h100)
    assert abs(volumes["BF16 off, %"]) < LIMIT and abs(volumes["FP8 off, %"]) < LIMIT
    assert volumes["FP8 here"] == pytest.approx(volumes["BF16"] / 2, rel=0.01)


def test_the_page_shows_the_numbers(tool):
    """Every row of the file is on the page, to the decimal."""
    numbers = json.loads((ROOT / "docs/benchmarks/paper_tables.json").read_text())
    page = (ROOT / "docs/benchmarks/paper_tables.md").read_text().replace("**", "")
    for row in numbers["table5"]:
        shown = (row["micro-batch"], row["GB, paper"], f"{row['GB, most']:.1f}")
        assert f"| {shown[0]} | {shown[1]} | {shown[2]} | {row['off, %']:.1f} |" in page, row
    for row in (row for rows in numbers["tuning"].values() for row in rows):
        shown = f"| {row['BF16']:.2f} | {row['FP8']:.2f} | {row['change, %']:.1f} |"
        assert shown in page, row
    for row in numbers["speed_ups"]:
        shown = f"| {row['published']:.2f} | {row['predicted']:.2f} | {row['off, %']:.1f} |"
        assert shown in page, row
