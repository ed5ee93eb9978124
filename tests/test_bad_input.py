"""Bad input of every kind: one line that names the thing, exit code 2, and no file written."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import warnings

import pytest
import torch

from fp8lm.launch.main import main as launch
from fp8lm.runtime import errors
from fp8lm.runtime.errors import run_command
from tests.bad_input import checkpoint, config, data, environment, launcher, tools
from tests.bad_input.cases import ROOT, Case

TOPICS = {
    "config": config.CASES,
    "data": data.CASES,
    "checkpoint": checkpoint.CASES,
    "environment": environment.CASES,
    "launcher": launcher.CASES,
    "tools": tools.CASES,
}
CASES = [
    pytest.param(case, id=f"{topic}: {case}") for topic, cases in TOPICS.items() for case in cases
]


def command(name):
    if name == "launch":
        return launch
    folder = ROOT if name == "pretrain_gpt" else ROOT / "tools"
    spec = importlib.util.spec_from_file_location(f"bad_input_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module.main


def contents(folder):
    """Every file below `folder`, and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_nothing_written(case: Case, tmp_path, monkeypatch, capfd):
    if "sees no GPU" in case.says[0] and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(errors, "PATIENCE", 0.0)
    monkeypatch.chdir(tmp_path)
    case.prepare(tmp_path)
    before = contents(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = run_command(command(case.command), list(case.arguments))
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for text in case.says:
        assert text in err
    assert "Traceback" not in err and "iteration " not in out
    assert contents(tmp_path) == before
    assert os.getcwd() == str(tmp_path)


def test_there_are_as_many_as_the_pages_say():
    messages = {
        (case.command, case.arguments, case.says) for cases in TOPICS.values() for case in cases
    }
    for page, words in (
        ("CHANGELOG.md", "kinds of bad input"),
        ("docs/user-guide/troubleshooting.md", "of them"),
    ):
        (said,) = re.findall(rf"(\d+) {words}", (ROOT / page).read_text())
        assert int(said) <= len(messages) < int(said) + 50
    assert all(len(cases) >= 8 for cases in TOPICS.values())
