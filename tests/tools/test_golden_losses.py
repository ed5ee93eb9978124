"""The gate of a refactoring: equal to itself, and not to anything else."""

from __future__ import annotations

import copy
import json

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_equals_itself_but_for_a_change(run_tool, tmp_path, capsys):
    file, only = tmp_path / "golden.json", ("--only", "o3")
    assert run_tool("golden_losses", "write", "--output", file, *only) == 0
    golden = json.loads(file.read_text())
    reports, tensors = golden["runs"]["o3"]["reports"], golden["runs"]["o3"]["tensors"]
    assert [line["consumed_samples"] for line in reports if "grad-norm" in line] == [
        8 * step for step in range(1, 7)
    ]
    changed = next(name for name in tensors if name.endswith("payload"))
    tensors[changed] = "0" * 16
    file.write_text(json.dumps(golden))
    capsys.readouterr()
    assert run_tool("golden_losses", "check", file, *only) == 1
    # Reports come first, so they are all equal; and so is every other tensor.
    assert f"1 of {len(tensors)} tensors, the first {changed}\n" in capsys.readouterr().out


def test_difference(tool):
    difference = tool("golden_losses").difference
    one = {"reports": [{"lm loss": 1.0}], "tensors": {"a": "0", "b": "1"}}
    assert difference(one, copy.deepcopy(one)) is None
    for path, value in (("a", "2"), ("c", "0")):
        two = copy.deepcopy(one)
        two["tensors"][path] = value
        assert f"the first {path}" in difference(one, two)
    for reports in ([{"lm loss": 1.1}], [], [{}], [{"lm loss": 1.0}, {"lm loss": 1.0}]):
        assert difference(one, one | {"reports": reports}) is not None


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["check"], "--against"),
        (["check", "golden.json", "--against", "HEAD"], "--against"),
        (["check", "missing.json"], "missing.json"),
        (["check", "--against", "no_such_commit", "--only", "o3"], "no_such_commit"),
        (["write", "--output", "x.json", "--only", "o9"], "o9"),
    ],
)
def test_bad_input_is_one_line(argv, named, run_tool, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_tool("golden_losses", *argv) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line


def test_a_file_of_another_machine_is_refused(tool, run_tool, tmp_path, capsys):
    file = tmp_path / "golden.json"
    file.write_text(json.dumps({"machine": {"processor": "another", "torch": "1"}, "runs": {}}))
    assert run_tool("golden_losses", "check", file) == 2
    assert "--against" in capsys.readouterr().err
