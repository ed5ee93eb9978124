"""Gaps over several comparisons."""

from __future__ import annotations

import json
import re

import pytest

# Base losses differ by comparison, gaps are 1 and 3 %, then 2 % (of 2.0 and of 4.0).
FIRST = {"bf16": [2.0, 2.0], "o3": [2.02, 2.06], "o4": [2.0, 2.0]}
SECOND = {"bf16": [4.0], "o3": [4.08]}


@pytest.fixture
def summary(tmp_path):
    """Write the losses of recipes as compare_recipes.py does."""

    def write(name, losses, **more):
        rows = {recipe: {"validation losses": values, **more} for recipe, values in losses.items()}
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    return write


def rows(text):
    """Mean, half width (None for one pair) and number of pairs by recipe."""
    found = re.findall(r"^(\w+) +([+-].*?) % +(?:\+-(.*?) %)? +(\d+) ", text, re.MULTILINE)
    return {
        name: (float(mean), float(half) if half else None, int(pairs))
        for name, mean, half, pairs in found
    }


def test_pairs_of_all_comparisons_count_alike(summary, run_tool, capsys):
    assert run_tool("pool_gaps", summary("a.json", FIRST), summary("b.json", SECOND)) == 0
    # Of 1, 2 and 3 %: t(2) = 4.303 x 1 / sqrt(3).
    assert rows(capsys.readouterr().out) == {"o3": (2.0, 2.484, 3), "o4": (0.0, 0.0, 2)}


def test_gaps_are_to_the_base_of_the_same_comparison(summary, run_tool, capsys):
    assert run_tool("pool_gaps", summary("b.json", SECOND), "--base", "o3") == 0
    assert rows(capsys.readouterr().out) == {"bf16": (pytest.approx(-1.961, abs=5e-4), None, 1)}


def test_gaps_of_the_same_weights_count_once(summary, run_tool, capsys):
    third = {"bf16": [1.0, 1.0], "o3": [1.03, 1.0], "te": [1.01, 1.03]}
    same = f"{summary('a.json', FIRST, seeds=[1, 2])},{summary('c.json', third, seeds=[1, 2])}"
    assert run_tool("pool_gaps", same, summary("b.json", SECOND, seeds=[1])) == 0
    # Of o3 (1 + 3) / 2 and (3 + 0) / 2 %, and 2 % by itself: t(2) x 0.289 / sqrt(3).
    expected = {"o3": (1.833, 0.717, 3), "o4": (0.0, 0.0, 2), "te": (2.0, 12.706, 2)}
    assert rows(capsys.readouterr().out) == expected


def test_what_is_no_other_comparison(summary, run_tool, capsys):
    first = summary("a.json", FIRST, seeds=[1, 2], precision={"preset": "x"})
    other = summary("b.json", FIRST, seeds=[1, 3], precision={"preset": "y"})
    for arguments, message in (
        ((first, first.parent / "." / "a.json"), "a.json is named twice"),
        ((f"{first},{first}",), "a.json is named twice"),
        ((first, other), f"bf16 is one recipe in {first} and another one in {other}"),
    ):
        assert run_tool("pool_gaps", *arguments) == 2
        assert message in capsys.readouterr().err
    other = summary("b.json", FIRST, seeds=[1, 3], precision={"preset": "x"})
    assert run_tool("pool_gaps", first, other) == 0
    assert run_tool("pool_gaps", f"{first},{other}") == 2
    assert "have different seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (FIRST, ["--base", "te"], "no recipe te"),
        ({"bf16": [2.0, 2.0], "o3": [2.0]}, [], "different numbers of seeds"),
        ({}, [], "no summary.json"),
        ({"bf16": [2.0, 2.0]}, [], "nothing beside bf16"),
        ({"bf16": ["a"], "o3": [2.0]}, [], "no summary.json"),
        ({"bf16": 3, "o3": 3}, [], "no summary.json"),
        ({"bf16": [], "o3": []}, [], "no summary.json"),
        ({"bf16": [0.0], "o3": [1.0]}, [], "no summary.json"),
        ({"bf16": [2.0], "o3": None}, [], "no summary.json"),
        ({"bf16": [2.0], "o3": [float("nan")]}, [], "no summary.json"),
    ],
)
def test_what_cannot_be_paired(losses, options, message, summary, run_tool, capsys):
    assert run_tool("pool_gaps", summary("a.json", losses), *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_none(tmp_path, run_tool, capsys):
    (tmp_path / "other.json").write_text("[1]")
    assert run_tool("pool_gaps", tmp_path / "other.json") == 2
    assert "no summary.json" in capsys.readouterr().err
    assert run_tool("pool_gaps", tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err
