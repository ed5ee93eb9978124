"""The command of tools/convert_checkpoint.py in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fp8lm.runtime.errors import run_command

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="session")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_checkpoint"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, capsys):
    """Exit code and what the command said, of these arguments."""

    def run_tool(source, target, folder, output, *more):
        capsys.readouterr()
        argv = ["--from", source, "--to", target, "--input", folder, "--output", output, *more]
        code = run_command(tool.main, [str(value) for value in argv])
        return code, "".join(capsys.readouterr())

    return run_tool


@pytest.fixture
def convert(run):
    """Convert, which must succeed."""

    def convert_model(*arguments):
        code, said = run(*arguments)
        assert code == 0, said
        return said

    return convert_model
