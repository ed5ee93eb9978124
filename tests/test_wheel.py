"""The wheel: built without a network, complete, nothing else inside, and of use where it lands."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fp8lm

ROOT = Path(__file__).parents[1]
EVERY_MODULE = """
import pkgutil, sys, warnings
warnings.simplefilter("ignore")
import fp8lm
names = [module.name for module in pkgutil.walk_packages(fp8lm.__path__, "fp8lm.")]
for name in names:
    if not name.endswith("__main__"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:  # of what the extra `eval` alone installs
            if error.name != "lm_eval":
                raise
print(fp8lm.__file__, len(names))
"""


def run(*command, **keys):
    done = subprocess.run(command, capture_output=True, text=True, **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy: the build leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fp8lm", "tests", "tools", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    (path,) = target.iterdir()
    return path


@pytest.mark.slow
def test_contents(wheel):
    assert wheel.name == f"fp8lm-{fp8lm.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fp8lm").rglob("*.py")}
    data = f"fp8lm-{fp8lm.__version__}.data/data/share/fp8lm/"
    configs = {
        data + str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*") if p.is_file()
    }
    assert names == sources | {"fp8lm/py.typed"} | configs


@pytest.mark.slow
def test_metadata(wheel):
    archive, info = zipfile.ZipFile(wheel), f"fp8lm-{fp8lm.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Version"] == fp8lm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert any(requirement.startswith("torch") for requirement in metadata.get_all("Requires-Dist"))
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


@pytest.mark.slow
def test_it_works_where_there_is_no_checkout(wheel, tmp_path):
    options = ("--no-deps", "--no-index", "--target", str(tmp_path / "site"))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel))
    place = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    where, number = run(sys.executable, "-c", EVERY_MODULE, **place).split()
    assert Path(where).is_relative_to(tmp_path / "site") and int(number) > 80
    command, tiny = "site/bin/fp8lm-launch", "site/share/fp8lm/configs/gpt_tiny.yaml"
    assert "--module fp8lm.pretrain" in run(tmp_path / command, "--dry-run", tiny, **place)
    schema = run(sys.executable, "-m", "fp8lm.config", "--schema", **place)
    assert schema == (ROOT / "configs" / "schema.json").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_source_distribution_is_the_checkout(tmp_path):
    """Tests read the workflow, .ci/run and the settings of pre-commit, too."""
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-W", "ignore", "-c", build, cwd=tmp_path).splitlines()[-1]
    with tarfile.open(tmp_path / "dist" / name) as archive:
        packed = {member.name.partition("/")[2] for member in archive}
    assert set(tracked) - packed == {".gitignore"}


def test_the_changelog_begins_with_this_version():
    (newest, *_) = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert newest.startswith(f"## [{fp8lm.__version__}] - ")
