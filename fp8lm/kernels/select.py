"""Selects the kernels for a device, once per run."""

from __future__ import annotations

import torch

from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.interface import Kernels
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.runtime.errors import InputError

FP8_COMPUTE_CAPABILITY = (8, 9)


def select_kernels(device: torch.device) -> Kernels:
    """Kernels for `device`; InputError for a GPU without FP8 tensor cores.

    It is refused here instead of failing in the first GEMM.
    """
    if device.type == "cpu":
        return kernels_for_cpu()
    return kernels_for_gpu(
        torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    )


def describe_kernels(device: torch.device) -> str:
    """The name of the kernels for `device`, and the reason for the choice."""
    if device.type == "cpu":
        return "PyTorch with FP8 emulated exactly, as on every CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuBLASLt with FP8 tensor cores (compute capability {major}.{minor})"


def kernels_for_cpu() -> Kernels:
    """Eager PyTorch."""
    return ReferenceKernels()


def kernels_for_gpu(capability: tuple[int, int], name: str) -> Kernels:
    """cuBLASLt FP8 GEMMs, on a GPU that has them; InputError names the one that has not.

    FP8 support is read off the compute capability, not the product's name.
    """
    if capability < FP8_COMPUTE_CAPABILITY:
        needed = ".".join(map(str, FP8_COMPUTE_CAPABILITY))
        raise InputError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; FP8 tensor cores need "
            f"{needed} or newer: use another GPU or train.device=cpu"
        )
    return HopperKernels()
