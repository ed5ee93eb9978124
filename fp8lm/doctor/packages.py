"""Which packages are there, which versions are wanted, and whether they can be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lm.doctor.facts import Package

# What to import of a distribution whose module has another name. Of NVIDIA's apex a part that the
# unrelated package of that name, or an empty folder, does not have.
MODULES = {
    "megatron-core": "megatron.core",
    "pyyaml": "yaml",
    "transformer-engine": "transformer_engine",
    "apex": "apex.normalization",
}
OPTIONAL = ("triton", "transformer-engine", "apex")
IMPORT_TIMEOUT = 120  # seconds; from a cold network drive PyTorch takes a good part of a minute
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")

if TYPE_CHECKING:  # of the Pythons that are too old, 3.8 to 3.10, some cannot evaluate it
    from collections.abc import Callable, Iterator

    ImportCheck = Callable[[str], str | None]


def declared(checkout: Path) -> tuple[str, list[str]]:
    """Python versions and requirements that fp8lm asks for.

    Of the installed fp8lm, or of the checkout's pyproject.toml where it is not installed; of that
    the versions alone on a Python that cannot read it, for which requirements are none.
    """
    try:
        installed = metadata("fp8lm")
        python = _lower_first(installed["Requires-Python"] or "")
        return python, installed.get_all("Requires-Dist") or []
    except PackageNotFoundError:
        pass
    try:
        text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
        import tomllib  # Python 3.11; an older one is to be told about, not to fail here

        project = tomllib.loads(text)["project"]
    except ImportError:
        found = re.search(r'^requires-python = "([^"]*)"', text, re.MULTILINE)
        return (found[1] if found else ""), []
    except (OSError, ValueError):
        return "", []
    return project["requires-python"], project["dependencies"]


def find_packages(requirements: list[str], import_check: ImportCheck) -> tuple[Package, ...]:
    """The packages that `requirements` name, extras left out, and the optional ones."""
    wanted = dict(_names_and_ranges(requirements))
    names = [*wanted, *(name for name in OPTIONAL if name not in wanted)]
    packages = [_find(name, wanted.get(name)) for name in names]
    present = [package for package in packages if package.present]
    # All in one process, which is quick; one by one only to find out which of them is to blame.
    if present and import_check(", ".join(_module(package.name) for package in present)) is None:
        return tuple(packages)
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda package: _imported(package, import_check), packages))


def error_of_import(modules: str) -> str | None:
    """Why `modules` (one, or several with commas between) cannot be imported; None if they can.

    In a process of its own: what crashes or hangs there leaves this one alive.
    """
    command = [sys.executable, "-W", "ignore", "-c", f"import {modules}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {IMPORT_TIMEOUT} s"
    if done.returncode < 0:
        return f"the process dies of signal {-done.returncode}"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
    return lines[-1] if done.returncode else None


def _names_and_ranges(requirements: list[str]) -> Iterator[tuple[str, str]]:
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} is not a requirement")
        name, versions, marker = match.groups()
        if "extra" not in (marker or ""):
            yield name.lower().replace("_", "-"), _lower_first(versions)


def _lower_first(bounds: str) -> str:
    return ",".join(sorted(bounds.replace(" ", "").split(","), reverse=True))


def _find(name: str, tested: str | None) -> Package:
    try:
        installed = version(name)
    except PackageNotFoundError:
        installed = None
    present = installed is not None or find_spec(_module(name).partition(".")[0]) is not None
    return Package(name, tested is not None, present, installed, tested or "")


def _imported(package: Package, import_check: ImportCheck) -> Package:
    return replace(package, error=import_check(_module(package.name)) if package.present else None)


def _module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))
