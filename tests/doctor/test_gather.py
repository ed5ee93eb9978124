"""Facts of this machine, and of one whose packages are missing or broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from fp8lm.doctor.__main__ import main, table
from fp8lm.doctor.facts import Accelerators, Gpu
from fp8lm.doctor.gather import gather
from fp8lm.doctor.judge import Finding
from fp8lm.doctor.machine import find_driver
from fp8lm.doctor.packages import declared, error_of_import, find_packages
from fp8lm.kernels import select_kernels

ROOT = Path(__file__).parents[2]


def fine(modules):
    return None


def broken(name):
    return lambda modules: "ImportError: undefined symbol" if name in modules.split(", ") else None


def test_facts_of_this_machine():
    facts = gather(import_check=fine)
    versions = {package.name: package.version for package in facts.packages}
    assert versions["torch"] == version("torch") and versions["pyyaml"] == version("pyyaml")
    assert ">=2.11,<2.15" in {package.tested for package in facts.packages}
    assert not any(package.name == "pytest" for package in facts.packages)  # of an extra
    assert len(facts.accelerators.gpus) == torch.cuda.device_count()
    cpu = facts.execution[0]
    kernels = select_kernels(torch.device("cpu"))
    assert (cpu.device, cpu.gemm, cpu.attention) == (
        "cpu",
        kernels.backends["gemm"],
        kernels.backends["attention"],
    )


def test_ranges_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    python, requirements = declared(ROOT)
    assert f'requires-python = "{python}"' in text
    packages = find_packages(requirements, fine)
    required = [package for package in packages if package.required]
    assert len(required) == len(tomllib.loads(text)["project"]["dependencies"])
    for package in required:
        assert f'"{package.name}{package.tested}"' in text


def test_a_python_that_cannot_read_pyproject(monkeypatch):
    """Below 3.11, where nothing is installed either: it is still told what it has to be."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fp8lm.doctor.packages.metadata", missing)
    expected, requirements = declared(ROOT)
    assert requirements
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert declared(ROOT) == (expected, [])


@pytest.fixture
def checkout(tmp_path):
    """The sources as git has them: an installation leaves a list of packages in a checkout."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "fp8lm", folder / "fp8lm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def runs(python):
    done = subprocess.run([python, "-c", ""], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_a_python_that_is_too_old_is_told_so(version, checkout, tmp_path):
    beside = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    found = [shutil.which(f"python{version}"), *beside]
    python = next((python for python in found if python and runs(python)), None)
    if python is None:
        pytest.skip(f"no Python {version} here")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(checkout)}
    command = [python, "-S", "-m", "fp8lm.doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first = done.stderr.splitlines()[0]
    assert re.fullmatch(rf"error: python {version}\.\d+ is too old: use one >=3\.11,<3\.14", first)


def test_a_broken_package_is_named_and_the_others_are_not():
    packages = find_packages(["torch>=2", "numpy>=1,<3"], broken("numpy"))
    errors = {package.name: package.error for package in packages if package.required}
    assert errors == {"torch": None, "numpy": "ImportError: undefined symbol"}


def test_without_torch_no_cuda_is_asked():
    asked = []
    facts = gather(lambda: asked.append(True), broken("torch"))
    assert not asked and facts.accelerators.gpus == () and facts.execution == ()


def test_cuda_that_raises_is_a_fact():
    def raising():
        raise RuntimeError("CUDA error")

    assert gather(raising, fine).accelerators.error == "CUDA error"
    assert gather(Accelerators, fine).accelerators.error is None


def test_nothing_computes_on_amd_gpus():
    amd = Accelerators((Gpu("AMD Instinct MI300X", (9, 4), 1 << 37),), rocm="6.4")
    assert [execution.device for execution in gather(lambda: amd, fine).execution] == ["cpu"]


@pytest.mark.parametrize(
    ("answer", "driver"),
    [("580.95.05\\n580.95.05", "580.95.05"), ("No devices were found", None), ("", None)],
)
def test_what_nvidia_smi_says(answer, driver, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("fp8lm.doctor.machine.DRIVER_FILE", tmp_path / "none")
    assert find_driver() == driver


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("broken_raise", "RuntimeError: half installed"),
        ("broken_exit", "without a message"),
        ("broken_crash", "the process dies of signal 6"),
        ("broken_nowhere", "ModuleNotFoundError: No module named 'broken_nowhere'"),
        ("json, broken_raise", "RuntimeError: half installed"),
        ("json", None),
    ],
)
def test_imports_in_a_process_of_their_own(tmp_path, monkeypatch, module, text):
    (tmp_path / "broken_raise.py").write_text("raise RuntimeError('half installed')")
    (tmp_path / "broken_exit.py").write_text("raise SystemExit(3)")
    (tmp_path / "broken_crash.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error_of_import(module) == text


def test_table_marks_what_matters():
    lines = table(
        [Finding("a", "1"), Finding("bcd", "22", "note", "costs"), Finding("e", "", "problem", "!")]
    ).splitlines()
    assert lines == ["  a    1", "- bcd  22  costs", "! e        see the error"]


@pytest.mark.slow  # imports everything
def test_the_command_on_this_machine(capsys):
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["problems"] == []
    assert {"torch", "cpu", "NCCL"} <= {finding["subject"] for finding in report["findings"]}


def test_the_command_without_any_package(checkout, tmp_path):
    """A Python with nothing installed: everything is missing, each one a line with its cure."""
    command = [sys.executable, "-S", "-m", "fp8lm.doctor"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    (missing,) = (line for line in errors if line.startswith("error: torch "))
    assert missing.endswith('pip install "torch>=2.11,<2.15"')
    assert "! megatron-core" in done.stdout
