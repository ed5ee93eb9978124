"""The Dockerfile: linted where hadolint is installed, and checked for what a lint cannot know."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}


def instructions():
    """(instruction, arguments) of every line, continuations joined, heredocs left out."""
    text = re.sub(r"<<'EOF' (.*?)\n.*?\nEOF\n", r"\1\n", DOCKERFILE, flags=re.DOTALL)
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def stages():
    """Each stage by name: its base and its instructions."""
    found = {}
    for name, arguments in instructions():
        if name == "FROM":
            base, _, stage = arguments.split()
            found[stage] = (base, current := [])
        else:
            current.append((name, arguments))
    return found


def pins():
    lines = (ROOT / "docker" / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def tool(name):
    """A linter beside this interpreter or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def test_hadolint():
    if (hadolint := tool("hadolint")) is None:
        pytest.skip("hadolint is not installed: it comes with the extra dev")
    done = subprocess.run(
        [hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_stages_and_the_default_one():
    assert list(stages()) == ["cpu", "ngc", "apex", "gpu-packages", "gpu"]


def test_bases_are_pinned():
    for base, _ in stages().values():
        if base not in stages():
            assert re.search(r":\d[\w.-]*$", base), base


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_the_user_is_not_root(stage):
    names = [name for name, _ in stages()[stage][1]]
    (user,) = (arguments for name, arguments in stages()[stage][1] if name == "USER")
    assert int(user) > 0
    assert f"--uid {user} " in DOCKERFILE
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


def copied(stage):
    """Sources of COPY from the build context."""
    for name, arguments in stages()[stage][1]:
        words = shlex.split(arguments)
        if name == "COPY" and not words[0].startswith("--"):
            yield from words[:-1]


def test_what_is_copied_is_there_and_reaches_the_build():
    everything, *rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert everything == "*"
    kept = {rule[1:].rstrip("/") for rule in rules if rule.startswith("!")}
    sources = {path.rstrip("/") for stage in stages() for path in copied(stage)}
    assert sources == kept
    assert all((ROOT / path).exists() for path in sources)


def test_code_is_copied_after_all_that_changes_less():
    """A change of the code rebuilds neither PyTorch nor the packages."""
    for stage in ("cpu", "gpu"):
        steps = [f"{name} {arguments}" for name, arguments in stages()[stage][1]]
        code = next(i for i, step in enumerate(steps) if "COPY fp8lm/" in step)
        heavy = [i for i, step in enumerate(steps) if "requirements" in step or "venv /opt" in step]
        assert heavy and max(heavy) < code


def test_pins_are_whole_and_within_the_ranges():
    missing = WANTED.keys() - pins().keys()
    assert missing == {"torch"}
    for name in WANTED.keys() & pins().keys():
        assert Version(pins()[name]) in WANTED[name], name


def test_torch_is_within_its_range():
    (cpu,) = re.findall(r"^ARG TORCH_VERSION=(.+)$", DOCKERFILE, re.MULTILINE)
    assert Version(cpu) in WANTED["torch"]
    assert f'"torch=={"${TORCH_VERSION}"}+cpu"' in DOCKERFILE
    base, _ = stages()["ngc"]
    assert base.startswith("nvcr.io/nvidia/pytorch:")
    (ngc,) = re.findall(r"torch (\S+)\n?.*\(\w+\)", DOCKERFILE)
    assert WANTED["torch"].contains(ngc, prereleases=True)


def test_apex_is_nvidias_and_of_one_commit():
    assert "apex" not in pins() and "transformer-engine" not in pins()
    (commit,) = re.findall(r"^ARG APEX_COMMIT=(.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    assert '"git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"' in DOCKERFILE
    assert not re.search(r"pip install[^\n]*\bapex\b", DOCKERFILE)


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_the_command_names_what_is_there(stage):
    (command,) = (arguments for name, arguments in stages()[stage][1] if name == "CMD")
    words = command.strip("[]").replace('"', "").split(", ")
    files = [word for word in words if "/" in word or word.endswith(".py")]
    if "-m" in words:
        module = words[words.index("-m") + 1].replace(".", "/")
        files.append(f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py")
    assert files
    for file in files:
        assert (ROOT / file).exists(), file
