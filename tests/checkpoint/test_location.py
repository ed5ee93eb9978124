"""What a path is that is given to load from, and what is said of one that is no such place."""

from __future__ import annotations

import pytest

from fp8lm.checkpoint.location import load_problem, locate
from fp8lm.config import CheckpointConfig


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")


def test_one_checkpoint_and_their_folder(saved, tmp_path, monkeypatch):
    one = tmp_path / "iter_0000100"
    (tmp_path / "best").symlink_to(one)
    for path in (one, f"{one}/", tmp_path / "best"):
        assert locate(path) == (tmp_path, 100)
    monkeypatch.chdir(one)
    assert locate(".") == (tmp_path, 100)
    assert locate(tmp_path) == (tmp_path, None)
    make(tmp_path, "runs/iter_0000007/latest_checkpointed_iteration.txt")
    odd = tmp_path / "runs/iter_0000007"
    assert locate(odd) == (odd, None)


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ("runs/y", "does not exist"),
        ("runs/xx", "did you mean {}/runs/x?"),
        ("runs", "did you mean {}/runs/x?"),
        ("hf", "Hugging Face"),
        ("sharded", "Hugging Face"),
        ("bare", "another program"),
        ("renamed", "under another name"),
        ("file", "not a folder"),
        ("empty", "latest_checkpointed_iteration.txt"),
        ("runs/x/iter_0000007", "does not exist"),
    ],
)
def test_nothing_to_load(load, says, tmp_path):
    make(tmp_path, "runs/x/latest_checkpointed_iteration.txt", "hf/model.safetensors", "file")
    make(tmp_path, "sharded/pytorch_model-00001-of-00002.bin", "bare/.metadata")
    make(tmp_path, "renamed/.metadata", "renamed/common.json")
    (tmp_path / "empty").mkdir()
    problem = load_problem(CheckpointConfig(load=str(tmp_path / load)))
    assert says.format(tmp_path) in problem and str(tmp_path / load) in problem


def test_the_same_folder_for_both_may_be_empty_unless_it_must_not(tmp_path):
    both = {"save": str(tmp_path / "new"), "load": f"{tmp_path}/./new"}
    assert load_problem(CheckpointConfig(**both)) is None
    assert load_problem(CheckpointConfig(**both, exit_on_missing_checkpoint=True))
    make(tmp_path, "new/model.safetensors")  # hardly a place for checkpoints
    assert "Hugging Face" in load_problem(CheckpointConfig(**both))
    assert load_problem(CheckpointConfig()) is None
    assert "checkpoint.load" in load_problem(CheckpointConfig(exit_on_missing_checkpoint=True))


def test_a_new_folder_beside_one_of_a_similar_name_starts_a_run(tmp_path):
    make(tmp_path, "runs/run1/latest_checkpointed_iteration.txt")
    folder = str(tmp_path / "runs/run2")
    assert load_problem(CheckpointConfig(save=folder, load=folder)) is None
    assert "did you mean" in load_problem(CheckpointConfig(load=folder))
