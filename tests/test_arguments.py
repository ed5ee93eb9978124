"""Overrides among options that take several values."""

from __future__ import annotations

import pytest

from fp8lm.arguments import split_overrides


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--seeds", "1", "2", "train.seed=3"], ["--seeds", "1", "2"]),
        (["train.seed=3", "--config", "a.yaml"], ["--config", "a.yaml"]),
        (["--recipes", "a=preset=o3", "train.seed=3", "--jobs", "2"], None),
        (["--recipes", "a=preset=o3,gemm=bf16", "b.yaml", "train.seed=3"], None),
    ],
)
def test_overrides_stand_anywhere(argv, options):
    rest, overrides = split_overrides(argv)
    assert overrides == ["train.seed=3"]
    assert rest == [text for text in argv if text != "train.seed=3"]
    assert options is None or rest == options
