"""Reports of runs as a table, a summary and a picture."""

from __future__ import annotations

import json

import pytest

SIZES = {"state_bytes_per_parameter": 7, "state_bytes_per_linear_parameter": 7}
REPORTS = [
    {"iteration": 0, "lm loss validation": 4.0},
    {"iteration": 10, "lm loss": 3.0, "state_bytes/weights": 10, **SIZES},
    {"iteration": 10, "lm loss validation": 2.0},
]


@pytest.fixture
def run(tmp_path):
    """A run that is being written: its last line is not whole yet."""
    lines = [json.dumps(report) for report in REPORTS]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join([*lines, lines[1][:25]]))
    return f"a={tmp_path / 'run'}"


def test_a_run_under_way(run, run_tool, tmp_path):
    summary, picture = tmp_path / "new/summary.json", tmp_path / "newer/loss.svg"
    assert run_tool("compare_runs", run, "--summary", summary, "--plot", picture) == 0
    assert json.loads(summary.read_text())["a"]["validation loss"] == 2.0
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("option", ["--summary", "--plot"])
@pytest.mark.parametrize("name", ["run/metrics.jsonl/x", "run"])
def test_what_cannot_be_written(option, name, run, run_tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_tool("compare_runs", run, option, name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: argument {option}: cannot write") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_gaps_in_pairs_of_seeds(run_tool, tmp_path, capsys):
    def write(name, loss):
        (tmp_path / name).mkdir()
        lines = [*REPORTS[:2], {"iteration": 10, "lm loss validation": loss}]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return str(tmp_path / name)

    first = ",".join(write(f"a{seed}", loss) for seed, loss in enumerate((2.0, 3.0, 4.0)))
    second = ",".join(write(f"b{seed}", loss) for seed, loss in enumerate((2.02, 3.06, 4.12)))
    summary = tmp_path / "summary.json"
    assert run_tool("compare_runs", f"a={first}", f"b={second}", "--summary", summary) == 0
    row = json.loads(summary.read_text())["b"]
    assert row["gap % by seed"] == pytest.approx([1.0, 2.0, 3.0])
    assert row["gap %"] == pytest.approx(2.0)
    # Standard deviation 1, three values: 4.303 / sqrt(3).
    assert row["gap % +-"] == pytest.approx(2.484, abs=1e-3)
    assert "+2.00 +- 2.48 %" in capsys.readouterr().out


def test_gaps_over_time(tool):
    compare = tool("compare_runs")

    def runs(*seeds):
        reports = {"state_bytes_per_parameter": 1.0, "state_bytes_per_linear_parameter": 1.0}
        return [compare.Curves([(1, 5.0)], valid, reports) for valid in seeds]

    base = runs([(0, 8.0), (5, 2.0), (10, 1.0)], [(0, 8.0), (5, 2.0), (7, 2.0), (10, 1.0)])
    other = runs(*([(0, 8.0), (5, 2.02), (7, 9.0), (10, 1.0 + gap)] for gap in (0.01, 0.03)))
    summary = compare.summarize({"a": base, "b": other})
    assert summary["a"]["gap % over time"] == []
    rows = summary["b"]["gap % over time"]
    assert [row["iteration"] for row in rows] == [0, 5, 10]  # 7 is not in every run
    assert [row["gap %"] for row in rows] == pytest.approx([0.0, 1.0, 2.0])
    # Two values that are 2 apart: t(1) x sqrt(2) / sqrt(2).
    assert [row["gap % +-"] for row in rows] == pytest.approx([0.0, 0.0, 12.706])
    assert rows[-1]["gap %"] == summary["b"]["gap %"]
