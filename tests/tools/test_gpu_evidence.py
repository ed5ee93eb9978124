"""The script of a GPU's first minutes, run on the CPU: legs, what is done, and wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

from tests.launch.conftest import ROOT

pytestmark = pytest.mark.slow


def evidence(*arguments):
    environment = os.environ | {"FP8LM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "tools/gpu_evidence.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_legs_run_once_and_a_failure_stops_no_other(tmp_path):
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor/done").touch()
    (tmp_path / "doctor.tar.gz.part").touch()
    ended = evidence("--dry-run", "--output", tmp_path, "doctor", "kernels", "step_175b", "graphs")
    assert ended.returncode == 0, ended.stderr
    assert "doctor: done before" in ended.stdout
    assert not (tmp_path / "doctor/log.txt").exists()
    with tarfile.open(tmp_path / "doctor.tar.gz") as archive:  # was not packed to the end
        assert "doctor/done" in archive.getnames()
    assert (tmp_path / "kernels/kernels.json").stat().st_size > 1000
    assert len(list((tmp_path / "step_175b").glob("*.json"))) == 3
    assert len(list((tmp_path / "graphs").glob("*.json"))) == 2
    assert all((tmp_path / leg / "done").exists() for leg in ("kernels", "step_175b", "graphs"))
    with tarfile.open(tmp_path / "kernels.tar.gz") as archive:
        assert "kernels/kernels.json" in archive.getnames()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("arguments", [("--dry-rum",), ("step_8b",), ("--output",), ("--wheels",)])
def test_no_such_leg_and_no_folder(arguments):
    ended = evidence(*arguments)
    assert ended.returncode == 2 and f"error: {arguments[0]} " in ended.stderr


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    ended = evidence("--dry-run", "--output", tmp_path / "file/output", "doctor")
    assert ended.returncode == 2
    assert f"error: --output {tmp_path}/file/output cannot be written: name" in ended.stderr


def test_wheels_are_there_while_it_runs(tmp_path):
    """The package of a wheel takes the place of an installed one: here of one that ends the leg."""
    (wheels := tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(wheels / "psutil-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("psutil/__init__.py", "raise ImportError('of the wheel')")
        facts = "Metadata-Version: 2.1\nName: psutil\nVersion: 99.0\n"
        wheel.writestr("psutil-99.0.dist-info/METADATA", facts)
        wheel.writestr("psutil-99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("psutil-99.0.dist-info/RECORD", "")
    output = tmp_path / "output"
    ended = evidence("--dry-run", "--wheels", wheels, "--output", output, "doctor")
    assert ended.returncode == 0, ended.stderr
    assert "of the wheel" in (output / "doctor/log.txt").read_text()
    assert sorted(path.name for path in output.iterdir()) == ["doctor", "doctor.tar.gz"]


def test_no_wheels(tmp_path):
    ended = evidence("--dry-run", "--wheels", tmp_path, "--output", tmp_path / "output", "doctor")
    assert ended.returncode == 2 and f"--wheels {tmp_path} holds no wheel" in ended.stderr


def test_wheels_of_another_python(tmp_path):
    (tmp_path / "torch-1.0-cp27-cp27m-win32.whl").touch()
    output = tmp_path / "output"
    ended = evidence("--dry-run", "--wheels", tmp_path, "--output", output, "doctor")
    assert ended.returncode == 2 and not output.exists()
    assert "torch-1.0-cp27-cp27m-win32.whl is not a supported wheel" in ended.stderr
    assert f"error: --wheels {tmp_path}: not for {sys.executable}" in ended.stderr


def test_a_folder_of_others_is_kept(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/mine").touch()
    ended = evidence("--dry-run", "--output", tmp_path, "train")
    assert ended.returncode == 2 and "is not of this script" in ended.stderr
    assert (tmp_path / "train/mine").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(tmp_path):
    ended = evidence("--output", tmp_path)
    assert ended.returncode == 2 and "--dry-run" in ended.stderr
    assert not list(tmp_path.iterdir())
