"""Run a command of tools/ in this process, as its own `__main__` would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fp8lm.runtime.errors import run_command

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def tool():
    """Load a tool's file as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run_tool(tool):
    """Run a tool with these arguments and return its exit code."""
    return lambda name, *argv: run_command(tool(name).main, [str(value) for value in argv])
