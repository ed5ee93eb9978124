"""Gather all facts; nothing that is missing or broken stops it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import fp8lm
from fp8lm.doctor.facts import Accelerators, Execution, Facts
from fp8lm.doctor.machine import find_accelerators, find_driver, plan_execution
from fp8lm.doctor.packages import declared, error_of_import, find_packages
from fp8lm.runtime.revision import Revision, source_revision

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8lm.doctor.packages import ImportCheck


def gather(
    accelerators: Callable[[], Accelerators] = find_accelerators,
    import_check: ImportCheck = error_of_import,
) -> Facts:
    """The facts of this machine; `accelerators` says what there is of GPUs."""
    python_tested, requirements = declared(Path(fp8lm.__file__).resolve().parents[1])
    packages = find_packages(requirements, import_check)
    torch = next((package for package in packages if package.name == "torch"), None)
    usable = torch is not None and torch.present and torch.error is None
    found = _ask(accelerators) if usable else Accelerators(driver=find_driver())
    return Facts(
        fp8lm=fp8lm.__version__,
        revision=describe(source_revision()),
        python=platform.python_version(),
        python_tested=python_tested,
        packages=packages,
        accelerators=found,
        # Kernels are PyTorch's: without it there is nothing to choose from.
        execution=_plan(found) if usable else (),
    )


def _ask(accelerators: Callable[[], Accelerators]) -> Accelerators:
    try:
        return accelerators()
    except Exception as error:  # whatever a driver in a bad state comes up with
        return Accelerators(driver=find_driver(), error=str(error))


def _plan(found: Accelerators) -> tuple[Execution, ...]:
    try:
        # ROCm's GPUs answer for CUDA with a capability; training refuses them by their build.
        return plan_execution(found.gpus if found.rocm is None else (), found.cuda)
    except Exception as error:  # a PyTorch without FP8, for instance
        return (Execution("kernels", refusal=f"fp8lm.kernels cannot be imported: {error!r}"),)


def describe(revision: Revision) -> str:
    """A revision in words."""
    if revision.commit is None:
        return "not from a checkout"
    branch = f" on {revision.branch}" if revision.branch else ""
    return f"commit {revision.commit[:12]}{branch}{', with changes' if revision.dirty else ''}"
