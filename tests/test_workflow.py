"""The workflow for public hosts, as far as it can be checked without one; every shell script."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fp8lm import __version__
from fp8lm.config.yaml_format import read_mapping

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
JOBS = read_mapping(WORKFLOW)["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = "\n".join(step["run"] for step in STEPS if "run" in step)


def test_actions_are_pinned_to_commits():
    uses = re.findall(r"uses: (\S+)(.*)", WORKFLOW.read_text())
    assert uses and all(
        re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) and re.match(r" # v\d", version)
        for action, version in uses
    )
    assert len({action for action, _ in uses}) == 2  # the same commit everywhere


def test_it_can_only_read_and_ends_by_itself():
    assert read_mapping(WORKFLOW)["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] <= 90 for job in JOBS.values())
    checkouts = [step for step in STEPS if "actions/checkout" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert "secrets." not in WORKFLOW.read_text()


def test_the_matrix_is_what_pyproject_allows():
    matrix = JOBS["fast"]["strategy"]["matrix"]
    (torch,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert all(version in torch.specifier for version in matrix["torch"])
    lowest, highest = matrix["torch"][0], matrix["torch"][-1]
    assert f">={lowest.rpartition('.')[0]}" in str(torch.specifier)
    assert f"<2.{int(highest.split('.')[1]) + 1}" in str(torch.specifier)
    classified = {c.split()[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert set(matrix["python"]) == classified
    assert all(f"{v}.0" in SpecifierSet(PROJECT["requires-python"]) for v in matrix["python"])


def test_linters_are_those_of_the_extra_dev():
    named = set(re.findall(r'"([\w-]+>=[^"]+)"', JOBS["lint"]["steps"][2]["run"]))
    assert len(named) == 3 and named <= set(PROJECT["optional-dependencies"]["dev"])


def test_the_site_builder_is_that_of_the_extra_docs():
    named = re.findall(r'"([^"]+)"', JOBS["docs"]["steps"][2]["run"])
    assert named == PROJECT["optional-dependencies"]["docs"]


def test_what_it_calls_is_there():
    paths = re.findall(r"(?<![\w/])((?:scripts|configs|tests)/[\w./]+\w)", COMMANDS)
    modules = re.findall(r"-m (fp8lm[\w.]*)", COMMANDS)
    assert paths and all((ROOT / path).exists() for path in paths)
    assert modules and all((ROOT / m.replace(".", "/") / "__main__.py").exists() for m in modules)
    modes = set(re.findall(r"scripts/test\.sh (\w+)", COMMANDS))
    assert modes == {"fast", "full"}
    (stage,) = re.findall(r"--target (\w+)", COMMANDS)
    assert f" AS {stage}\n" in (ROOT / "Dockerfile").read_text()


def shell_scripts():
    yield from sorted((ROOT / "scripts").glob("*.sh"))
    yield ROOT / ".ci" / "run"


def shellcheck(*arguments, **keys):
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed: it comes with the extra dev")
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, **keys)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck():
    shellcheck("--external-sources", *map(str, shell_scripts()))


def test_steps_pass_shellcheck():
    steps = re.sub(r"\$\{\{.*?\}\}", "0", COMMANDS)  # filled in before a shell sees it
    # A step's shell ends at a cd that fails (-e).
    shellcheck("--shell=bash", "--exclude=SC2103,SC2164", "-", input=steps)


def test_citation_names_the_version():
    citation = read_mapping(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
