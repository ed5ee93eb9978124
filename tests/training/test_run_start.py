"""What a run says of how it was started."""

from __future__ import annotations

import json

import pytest
import torch

from fp8lm.config.yaml_format import to_yaml
from fp8lm.training.run_start import record_start, start_facts


def test_every_start_of_a_run_leaves_a_line(tmp_path, tiny_config, train_run, folders):
    train_run(tiny_config(folders("run"), {"train": {"exit_interval": 4, "eval_iters": 0}}))
    train_run(tiny_config(folders("run"), {"train": {"eval_iters": 0}}))
    lines = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert [first["iteration"], second["iteration"]] == [0, 4]
    assert first["processes"] == 1 and first["time"] <= second["time"]
    assert first["versions"]["torch"] == torch.__version__
    assert first["git"].keys() == {"commit", "branch", "dirty"}


def test_trackers_can_write_the_facts():
    facts = start_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert f"torch: {torch.__version__}" in to_yaml(facts)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        record_start(tmp_path / "missing", {}, 0, 1)
