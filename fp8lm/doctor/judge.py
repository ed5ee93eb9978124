"""Judges the facts: a remark on each, and whether training can run. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fp8lm.devices import NO_NCCL, NO_ROCM
from fp8lm.doctor.facts import Accelerators, Execution, Facts, Gpu, Package

NCCL_FP8_VERSION = (2, 24)  # reduces FP8 itself from here on,
NCCL_FP8_CAPABILITY = (9, 0)  # on Hopper and newer
GIB = 1 << 30

# What it costs to do without.
WITHOUT = {
    "triton": "speed on a GPU: casts and sums are eager operations of PyTorch",
    "transformer-engine": "nothing: fp8lm does not call it, megatron-core has other layers",
    "apex": "nothing: fp8lm does not call it, megatron-core has other layers",
}


Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem's remark is a sentence of its own, with the cure."""

    subject: str
    found: str
    status: Status = "ok"
    remark: str = ""


def judge(facts: Facts) -> list[Finding]:
    """All findings, in the order of the report."""
    return [
        judge_python(facts.python, facts.python_tested),
        *(judge_package(package, facts.packages) for package in facts.packages),
        *judge_accelerators(facts.accelerators, _version_of("torch", facts)),
        *(finding for execution in facts.execution for finding in judge_execution(execution)),
    ]


def problems(findings: list[Finding]) -> list[str]:
    """What keeps training from running here, a line each."""
    return [finding.remark for finding in findings if finding.status == "problem"]


def judge_python(found: str, tested: str) -> Finding:
    """Python's version against the range declared, which is empty if none was found."""
    if not tested:
        cure = "fp8lm is not installed, and what it needs is unknown: pip install its folder"
        return Finding("python", found, "problem", cure)
    position = _position_of_python(found, tested)
    if position < 0:
        cure = f"python {found} is too old: use one {tested}"
        return Finding("python", found, "problem", cure)
    if position > 0:
        return Finding("python", found, "note", f"not tested with this version: {tested}")
    return Finding("python", found, remark=f"tested {tested}")


def judge_package(package: Package, packages: Sequence[Package] = ()) -> Finding:
    """A package among `packages`: missing, broken, too old, untested, or as it should be."""
    name, found = package.name, package.version or ("present" if package.present else "missing")
    wanted = f'"{name}{package.tested}"'
    if not package.present:
        if not package.required:
            return Finding(name, found, "note", f"costs {WITHOUT[name]}")
        cure = f"{name} is missing: pip install {wanted}"
        return Finding(name, found, "problem", cure)
    if package.error is not None:
        if (cause := _cause(package, packages)) is not None:
            return Finding(name, found, "note", f"cannot be imported because of {cause}")
        if name == "triton":
            costs = f"cannot be imported ({package.error}), which costs {WITHOUT[name]}"
            return Finding(name, found, "note", costs)
        return Finding(name, found, "problem", _broken(package))
    position = _position(package.version, package.tested)
    if position < 0:
        cure = f"{name} {found} is too old: pip install {wanted}"
        return Finding(name, found, "problem", cure)
    if position > 0:
        return Finding(name, found, "note", f"not tested with this version: {package.tested}")
    return Finding(name, found, remark=f"tested {package.tested}" if package.tested else "")


def _cause(package: Package, packages: Sequence[Package]) -> str | None:
    """The other package whose absence or failure is all that is wrong with this one."""
    absent = re.search(r"No module named '([\w.]+)'", package.error or "")
    for other in packages:
        if not other.present and absent and absent[1] == other.name:
            return other.name
        # megatron-core imports torch and TransformerEngine, and fails with their words.
        same = other.error == package.error and other.name in ("torch", "transformer-engine")
        if same and other is not package:
            return other.name
    return None


def _broken(package: Package) -> str:
    name = package.name
    if name == "apex":
        return (
            f"apex is not NVIDIA's, or empty ({package.error}), and megatron-core would build "
            "models with it: pip uninstall apex, or remove the folder of that name"
        )
    if name == "transformer-engine":
        return (
            f"transformer-engine cannot be imported ({package.error}), and megatron-core fails "
            "with it: pip uninstall transformer-engine, or pip install --no-build-isolation "
            '"transformer-engine[pytorch]"'
        )
    return f"{name} cannot be imported ({package.error}): install it again"


def judge_accelerators(found: Accelerators, torch_version: str | None) -> Iterator[Finding]:
    """GPUs, driver, CUDA and NCCL."""
    if found.error is not None:
        line = f"CUDA fails ({found.error}): check the GPU with nvidia-smi, or use train.device=cpu"
        yield Finding("GPU", "unknown", "problem", line)
    elif found.rocm is not None and found.gpus:
        yield Finding("GPU", "AMD", "problem", f"torch {torch_version}: {NO_ROCM}")
    elif not found.gpus:
        yield Finding("GPU", "none", "note", _why_no_gpu(found, torch_version))
    for index, gpu in enumerate(found.gpus):
        capability = ".".join(map(str, gpu.capability))
        size = f"{gpu.memory / GIB:.0f} GiB"
        yield Finding(f"GPU {index}", gpu.name, remark=f"compute capability {capability}, {size}")
    if found.rocm is not None:  # its RCCL answers for NCCL
        yield Finding("ROCm", found.rocm, remark="that torch was built for")
        return
    yield Finding("driver", found.driver or "none")
    yield Finding("CUDA", found.cuda or "none", remark="that torch was built for")
    yield judge_nccl(found.nccl, found.gpus)


def _why_no_gpu(found: Accelerators, torch_version: str | None) -> str:
    if found.driver is not None and found.cuda is None and torch_version is not None:
        return (
            f"torch {torch_version} is no CUDA build, and an NVIDIA driver is here: install a CUDA "
            "build, or training runs on the CPU"
        )
    if found.driver is not None and found.cuda is not None:
        return (
            f"torch sees none: driver {found.driver} may be too old for CUDA {found.cuda}, or "
            "CUDA_VISIBLE_DEVICES hides it; training runs on the CPU"
        )
    return "training runs on the CPU: FP8's arithmetic, not its speed or memory"


def judge_nccl(version: tuple[int, ...] | None, gpus: tuple[Gpu, ...]) -> Finding:
    """NCCL, and whether it adds FP8 by itself on these GPUs (`fp8lm.comm.sums_fp8`)."""
    if version is None:
        if gpus:
            return Finding("NCCL", "none", "problem", NO_NCCL)
        return Finding("NCCL", "none", remark="processes talk through gloo")
    able = version[:2] >= NCCL_FP8_VERSION and all(
        gpu.capability >= NCCL_FP8_CAPABILITY for gpu in gpus
    )
    able = able and bool(gpus)
    sums = "in NCCL" if able else "in a ring of sends, as this NCCL or GPU does not add FP8"
    remark = f"grad_reduce: fp32_accumulate moves bytes, fp8_sum adds {sums}"
    return Finding("NCCL", ".".join(map(str, version)), remark=remark)


def judge_execution(execution: Execution) -> Iterator[Finding]:
    """What computes on a device; a GPU that is refused is a problem, for it would be chosen."""
    device = execution.device
    if execution.refusal is not None:
        yield Finding(device, "refused", "problem", f"{device}: {execution.refusal}")
        return
    yield Finding(device, "GEMM", remark=execution.gemm)
    yield Finding(device, "scales", remark=execution.scaling)
    yield Finding(device, "attention", remark=execution.attention)
    yield Finding(device, "casts, AdamW", remark=execution.elementwise)


def _position_of_python(version: str, tested: str) -> int:
    """-1 below `tested`, 0 inside, 1 above, without packages: too old a Python may have none."""
    found = _release(version)
    for operator, bound in re.findall(r"(>=|<)\s*([0-9.]+)", tested):
        if operator == ">=" and found < _release(bound):
            return -1
        if operator == "<" and found >= _release(bound):
            return 1
    return 0


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])))


def _position(version: str | None, tested: str) -> int:
    """-1 below the tested range, 0 inside or unknown, 1 above; development versions count."""
    try:
        # Comes with megatron-core. Without it that one is broken, and said to be.
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        found, wanted = Version(version or ""), SpecifierSet(tested)
    except (ImportError, ValueError):
        return 0
    failed = [bound for bound in wanted if not bound.contains(found, prereleases=True)]
    if not failed:
        return 0
    return -1 if any(bound.operator in (">=", ">", "==", "~=") for bound in failed) else 1


def _version_of(name: str, facts: Facts) -> str | None:
    return next((package.version for package in facts.packages if package.name == name), None)
