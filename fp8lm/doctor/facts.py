"""Facts about a machine and its packages, not yet judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """An installed or wanted distribution.

    `tested` is the range of versions that fp8lm asks for, empty where it asks for none; `error`
    says why it cannot be imported, None where it can or is not there.
    """

    name: str
    required: bool
    present: bool
    version: str | None = None
    tested: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA describes it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Accelerators:
    """GPUs that PyTorch sees, and versions of CUDA, NCCL and driver; None if there is none.

    `error` says why CUDA could not be asked.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda: str | None = None  # that PyTorch was built for
    rocm: str | None = None  # likewise
    driver: str | None = None
    nccl: tuple[int, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Execution:
    """What computes on one device, as `fp8lm.kernels` chooses; or why it refuses the device."""

    device: str
    gemm: str = ""
    attention: str = ""
    elementwise: str = ""
    scaling: str = ""
    refusal: str | None = None


@dataclass(frozen=True)
class Facts:
    """All of it."""

    fp8lm: str
    revision: str
    python: str
    python_tested: str
    packages: tuple[Package, ...]
    accelerators: Accelerators = Accelerators()
    execution: tuple[Execution, ...] = ()
