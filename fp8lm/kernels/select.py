"""Which kernels run on which device; chosen once and passed on."""

from __future__ import annotations

import torch

from fp8lm.errors import InputError
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.reference import ReferenceKernels

FP8_COMPUTE_CAPABILITY = (8, 9)


def select_kernels(device: torch.device) -> ReferenceKernels:
    """Kernels for `device`: eager PyTorch on CPU, cuBLASLt FP8 GEMMs on a GPU that has them.

    FP8 support is read off the compute capability, not the product's name. A GPU without FP8
    tensor cores is refused here instead of failing in the first GEMM.
    """
    if device.type == "cpu":
        return ReferenceKernels()
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_COMPUTE_CAPABILITY:
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; FP8 tensor cores need 8.9 or newer: "
            "use another GPU or train.device=cpu"
        )
    return HopperKernels()
