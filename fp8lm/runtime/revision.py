"""The git revision of the source that this process runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
COMMIT_VARIABLE = "FP8LM_COMMIT"  # names the commit where no .git comes along: images, archives
TIMEOUT = 10  # seconds; a checkout on a slow network drive must not hold a run
# Set by git for its hooks; they would lead to the repository of the hook.
_REDIRECTIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


@dataclass(frozen=True)
class Revision:
    """Commit, branch, and whether tracked files differ from the commit; None where unknown."""

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None


def source_revision(
    package: Path = PACKAGE, environment: Mapping[str, str] | None = None
) -> Revision:
    """The revision of the checkout that `package` lies in; never fails, prints or asks.

    No remote is read: its address may carry a password.
    """
    environment = os.environ if environment is None else environment
    # A package installed as a wheel may lie inside the repository of somebody else's project.
    if _git(package, environment, "ls-files", "--error-unmatch", "__init__.py") is None:
        return Revision(commit=environment.get(COMMIT_VARIABLE) or None)
    changes = _git(package, environment, "status", "--porcelain", "--untracked-files=no")
    return Revision(
        commit=_git(package, environment, "rev-parse", "--verify", "HEAD"),
        branch=_git(package, environment, "branch", "--show-current") or None,
        dirty=None if changes is None else bool(changes),
    )


def _git(folder: Path, environment: Mapping[str, str], *arguments: str) -> str | None:
    kept = {name: value for name, value in environment.items() if name not in _REDIRECTIONS}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**kept, "GIT_OPTIONAL_LOCKS": "0"},  # reading must not get in a commit's way
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return None if done.returncode else done.stdout.decode(errors="replace").strip()
