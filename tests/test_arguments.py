"""Overrides among options that take several values; types of paths and lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8lm.arguments import EachOnce, file_to_write, folder_to_write, split_overrides
from fp8lm.runtime.errors import CommandParser, InputError


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


def parsed(*argv, **options):
    parser = CommandParser()
    parser.add_argument("--x", **options)
    return parser.parse_args([f"--x={argv[0]}"] if len(argv) == 1 else ["--x", *argv]).x


@pytest.mark.parametrize("kind", [file_to_write, folder_to_write])
def test_what_can_be_written(kind, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "new", tmp_path / "a/b/new"):
        assert parsed(str(path), type=kind) == path
    there = tmp_path / "file" if kind is file_to_write else tmp_path
    assert parsed(str(there), type=kind) == there
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file"]


def test_a_device_can_be_written():
    assert parsed("/dev/stdout", type=file_to_write) == Path("/dev/stdout")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (file_to_write, ".", "it is a folder"),
        (file_to_write, "file/x", "file is not a folder"),
        (file_to_write, "file/x/y", "file is not a folder"),
        (folder_to_write, "file", "file is not a folder"),
        (folder_to_write, "file/x", "file is not a folder"),
    ],
)
def test_what_cannot_be_written(kind, name, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"--x: cannot write .*{message}"):
        parsed(str(tmp_path / name), type=kind)


def test_values_that_come_twice():
    assert parsed("3", "1", nargs="+", type=int, action=EachOnce) == [3, 1]
    with pytest.raises(InputError, match="--x: 1, 3 comes twice"):
        parsed("3", "1", "2", "3", "1", nargs="+", type=int, action=EachOnce)
