"""Selects the kernels for a device, once per run."""

from __future__ import annotations

import os
import shutil

import torch

from fp8lm.config import Config
from fp8lm.config.checks.precision import blocks_on_gpu
from fp8lm.config.precision import KernelsName, PrecisionConfig
from fp8lm.kernels.attention import fused_attention
from fp8lm.kernels.cublaslt import why_unsupported
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, Kernels
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.numerics import BLOCK_1X128, MX_1X32, PER_ROW, PER_TENSOR, granularity_by_name
from fp8lm.runtime.errors import InputError

FP8_COMPUTE_CAPABILITY = (8, 9)


def select_kernels(device: torch.device, wanted: KernelsName = "auto") -> Kernels:
    """Kernels for `device`, as `precision.kernels` wants them; InputError if they cannot run there.

    So it is for a GPU without FP8 tensor cores, which would fail in the first GEMM.
    """
    if device.type != "cpu":
        capability = torch.cuda.get_device_capability(device)
        return kernels_for_gpu(capability, torch.cuda.get_device_name(device), wanted)
    return kernels_for_cpu(wanted)


def check_scaling(device: torch.device, config: Config, *, trains: bool = True) -> None:
    """InputError if `device` has no GEMM of the scales in `precision.scaling`, or of the sizes.

    `trains` False: only forward's GEMMs are needed.
    """
    if device.type != "cpu" and config.precision.gemm == "fp8":
        capability = torch.cuda.get_device_capability(device)
        check_scaling_on_gpu(capability, torch.version.cuda, config.precision)
        check_blocks_on_gpu(config, trains=trains)


def check_scaling_on_gpu(
    capability: tuple[int, int], cuda: str | None, precision: PrecisionConfig
) -> None:
    """`check_scaling` for a GPU of this compute capability and a PyTorch built for `cuda`."""
    scaling = precision.scaling.by_kind()
    for first, second in (("input", "weight"), ("grad_output", "weight"), ("grad_output", "input")):
        a, b = granularity_by_name(scaling[first]), granularity_by_name(scaling[second])
        if reason := why_unsupported(a, b, capability, cuda):
            raise InputError(
                f"precision.scaling.{first} = {scaling[first]} with precision.scaling.{second} = "
                f"{scaling[second]}: {reason}; train.device=cpu computes it, or use tensor for all"
            )


def check_blocks_on_gpu(config: Config, *, trains: bool = True) -> None:
    """InputError for sizes that blocks of 128 do not divide: a GPU's GEMMs have whole ones only."""
    if problems := list(blocks_on_gpu(config, trains=trains)):
        raise InputError("; ".join(problems))


def describe_scaling(capability: tuple[int, int] | None, cuda: str | None) -> str:
    """The scales of operands that GEMMs take on a CPU (None) or a GPU of `capability`."""
    kinds = {"tensor": PER_TENSOR, "row": PER_ROW, "block of 128": BLOCK_1X128, "MXFP8": MX_1X32}
    reasons = {
        name: None if capability is None else why_unsupported(kind, kind, capability, cuda)
        for name, kind in kinds.items()
    }
    able = "per " + ", ".join(name for name, reason in reasons.items() if reason is None)
    unable = [f"{name} not: {reason}" for name, reason in reasons.items() if reason is not None]
    return "; ".join([able, *unable])


def describe_kernels(device: torch.device, wanted: KernelsName = "auto") -> str:
    """What computes on `device`, and the reason for the choice."""
    if device.type == "cpu":
        compiled = ", operations compiled (precision.kernels=compiled)"
        kernels = compiled if wanted == "compiled" else ""
        return f"PyTorch with FP8 emulated exactly, as on every CPU{kernels}"
    major, minor = torch.cuda.get_device_capability(device)
    by = select_kernels(device, wanted).backends
    return (
        f"cuBLASLt with FP8 tensor cores (compute capability {major}.{minor}), {by[ELEMENTWISE]} "
        f"(precision.kernels={wanted}); attention: {by[ATTENTION]}"
    )


def describe_attention(device: torch.device, wanted: KernelsName = "auto") -> str:
    """What computes attention on `device`, of documents apart as well."""
    return select_kernels(device, wanted).backends[ATTENTION]


def kernels_for_cpu(wanted: KernelsName = "auto") -> Kernels:
    """Eager PyTorch, or compiled where that is `wanted`; InputError if nothing can be compiled."""
    if wanted == "triton":
        raise InputError(
            "precision.kernels=triton needs a GPU, and this process computes on the CPU: use "
            "precision.kernels=auto"
        )
    if wanted != "compiled":
        return ReferenceKernels()
    if reason := why_not_compiled():
        raise InputError(f"precision.kernels=compiled: {reason}; or use precision.kernels=eager")
    try:  # PyTorch's compiler, too: it takes a second, and makes the folder of its cache
        from fp8lm.kernels.compiled import CompiledKernels
    except OSError as error:
        raise InputError(
            f"precision.kernels=compiled: PyTorch's compiler has no folder for its cache ({error}):"
            " name one in TORCHINDUCTOR_CACHE_DIR, or use precision.kernels=eager"
        ) from error
    return CompiledKernels()


def why_not_compiled() -> str | None:
    """Why a CPU cannot have precision.kernels=compiled here, if so."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}: install g++, or name another in CXX"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 switches PyTorch's compiler off: unset it"
    return None


def describe_compiled() -> str:
    """Whether a CPU can have precision.kernels=compiled."""
    reason = why_not_compiled()
    return f"not compiled: {reason}" if reason else "can be compiled (precision.kernels=compiled)"


def kernels_for_gpu(
    capability: tuple[int, int], name: str, wanted: KernelsName = "auto"
) -> Kernels:
    """cuBLASLt FP8 GEMMs, on a GPU that has them; InputError names the one that has not.

    FP8 support is read off the compute capability, not the product's name. The rest is Triton's
    where that can be imported, or InputError if it cannot and is `wanted`. Sets PyTorch's switch
    for partial sums of split BF16 GEMMs: in fp32, as the rest of their accumulation.
    """
    if capability < FP8_COMPUTE_CAPABILITY:
        needed = ".".join(map(str, FP8_COMPUTE_CAPABILITY))
        raise InputError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; FP8 tensor cores need "
            f"{needed} or newer: use another GPU or train.device=cpu"
        )
    if wanted == "compiled":
        raise InputError(
            "precision.kernels=compiled is for CPUs, and this process computes on a GPU: use "
            "precision.kernels=auto"
        )
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    attention = fused_attention(capability)
    if wanted == "eager":
        return HopperKernels(attention)
    try:
        from fp8lm.kernels.triton.backend import TritonKernels  # optional
    except Exception as error:  # what a broken installation comes up with
        if wanted == "auto":
            return HopperKernels(attention)
        raise InputError(
            f"precision.kernels=triton, but Triton cannot be imported ({error}): "
            'pip install "triton>=3.6,<4", or use precision.kernels=eager'
        ) from None
    return TritonKernels(attention)
