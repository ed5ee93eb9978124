"""The state of the source: real git repositories, and what is left without one."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from fp8lm.runtime.revision import Revision, source_revision

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDENTITY = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git in a repository whose package `tmp_path/package` is committed."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def run(*arguments):
        command = ["git", "-C", str(tmp_path), *IDENTITY, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    run("init", "--initial-branch=trunk")
    run("add", ".")
    run("commit", "--message=first")
    return run


def test_commit_branch_and_cleanness(git, tmp_path):
    commit = git("rev-parse", "HEAD")
    assert source_revision(tmp_path / "package") == Revision(commit, "trunk", dirty=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("not part of the source")
    assert source_revision(tmp_path / "package").dirty is False
    (tmp_path / "package" / "__init__.py").write_text("changed = True\n")
    assert source_revision(tmp_path / "package") == Revision(commit, "trunk", dirty=True)


def test_detached_head_has_no_branch(git, tmp_path):
    git("checkout", "--detach")
    assert source_revision(tmp_path / "package").branch is None
    assert source_revision(tmp_path / "package").commit == git("rev-parse", "HEAD")


def test_a_wheel_inside_another_repository_is_not_that_repository(git, tmp_path):
    installed = tmp_path / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert source_revision(installed, os.environ) == Revision()


def test_variables_of_a_git_hook_do_not_lead_astray(git, tmp_path):
    commit = git("rev-parse", "HEAD")
    environment = dict(os.environ) | {"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index"}
    assert source_revision(tmp_path / "package", environment).commit == commit


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["no git", "no repository"])
def test_without_git_the_environment_may_name_the_commit(tmp_path, path, capfd):
    environment = {"PATH": path, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    assert source_revision(tmp_path, environment) == Revision()
    assert source_revision(tmp_path, environment | {"FP8LM_COMMIT": COMMIT}) == Revision(COMMIT)
    assert capfd.readouterr() == ("", "")
