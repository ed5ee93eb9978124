"""tools/faults.py on checkpoints that are made here: what it counts as survived, and what not."""

from __future__ import annotations

import random
import shutil
from types import SimpleNamespace

import pytest

from fp8lm.checkpoint import save_checkpoint
from tests.checkpoint.tensors import META, make_tensors, shards_of


@pytest.fixture
def faults(tool):
    return tool("faults")


@pytest.fixture
def bench(tmp_path):
    """What `Bench` offers to the kinds of faults that need no job."""
    for iteration in (10, 20):
        facts = META | {"batch_size": 4, "rollbacks": 0}
        save_checkpoint(tmp_path / "ck", iteration, shards_of(make_tensors()), facts)

    def pair(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(tmp_path / "ck", tmp_path / name)

    return SimpleNamespace(folder=tmp_path, rng=random.Random(2), checkpoint_pair=pair)


def test_flipped_bits_are_survived(faults, bench):
    assert list(faults.flip(bench, 40)) == [None] * 40


def test_every_tool_survives_hostile_checkpoints(faults, bench, monkeypatch):
    some = random.Random(4).sample(sorted(faults.REWRITTEN), 8)
    special = random.Random(4).sample(sorted(faults.SPECIAL), 6)
    monkeypatch.setattr(faults, "REWRITTEN", {name: faults.REWRITTEN[name] for name in some})
    monkeypatch.setattr(faults, "SPECIAL", {name: faults.SPECIAL[name] for name in special})
    assert list(faults.hostile(bench, 14)) == [None] * 14


def test_what_is_not_survived_is_counted(faults, bench, monkeypatch):
    monkeypatch.setattr(faults, "REWRITTEN", {"nothing": lambda folder: None})
    monkeypatch.setattr(faults, "SPECIAL", {})
    (problem,) = faults.hostile(bench, 1)
    assert "nothing: found 20, expected [10]" in problem
    monkeypatch.setitem(faults.KINDS, "hostile", faults.Kind(faults.hostile, 1))
    tally = faults.tried(bench, "hostile", 3)
    assert tally.runs == 3 and len(tally.failures) == 3


def test_a_kind_that_is_not_possible_here_is_left_out(faults, bench, monkeypatch):
    monkeypatch.setattr(faults, "private_mounts", lambda: False)
    tally = faults.tried(bench, "disk", 2)
    assert tally.runs == 0 and "not allowed" in tally.left_out and not tally.failures


def test_bad_arguments(run_tool, capsys):
    assert run_tool("faults", "--only", "earthquake") == 2
    assert run_tool("faults", "--runs", "0") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
