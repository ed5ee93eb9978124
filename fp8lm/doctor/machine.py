"""GPUs of this machine as PyTorch sees them, and the kernels that would be used."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lm.doctor.facts import Accelerators, Execution, Gpu
from fp8lm.runtime.errors import InputError

if TYPE_CHECKING:
    from fp8lm.kernels.interface import Kernels

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def find_accelerators() -> Accelerators:
    """GPUs, CUDA, NCCL and driver; needs a PyTorch that can be imported."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver too old for this PyTorch: judged from facts
        available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return Accelerators(
        gpus=tuple(_gpu(torch.cuda.get_device_properties(index)) for index in range(count)),
        cuda=torch.version.cuda,
        rocm=torch.version.hip,
        driver=find_driver(),
        nccl=tuple(nccl) if nccl is not None else None,
    )


def find_driver() -> str | None:
    """Version of NVIDIA's driver, with or without a PyTorch that can use it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, timeout=30, check=True).stdout
        first = output.decode(errors="replace").strip().partition("\n")[0]
        if re.fullmatch(r"\d+(\.\d+)+", first):  # it may say that there are no devices
            return first
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", DRIVER_FILE.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def plan_execution(gpus: Sequence[Gpu], cuda: str | None) -> tuple[Execution, ...]:
    """What `fp8lm.kernels` would use on the CPU and on each of `gpus`, with this CUDA."""
    return tuple(_executions(gpus, cuda))


def _executions(gpus: Sequence[Gpu], cuda: str | None) -> Iterator[Execution]:
    from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, GEMM
    from fp8lm.kernels.select import (
        describe_compiled,
        describe_scaling,
        kernels_for_cpu,
        kernels_for_gpu,
    )

    choices: list[tuple[str, tuple[int, int] | None, Callable[[], Kernels]]]
    choices = [("cpu", None, kernels_for_cpu)]
    for index, gpu in enumerate(gpus):
        of_gpu = partial(kernels_for_gpu, gpu.capability, gpu.name)
        choices.append((f"cuda:{index}", gpu.capability, of_gpu))
    for device, capability, choose in choices:
        try:
            kernels = choose()
        except InputError as error:
            yield Execution(device, refusal=str(error))
        else:
            by, scaling = kernels.backends, describe_scaling(capability, cuda)
            elementwise = by[ELEMENTWISE]
            if device == "cpu":
                elementwise += f"; {describe_compiled()}"
            yield Execution(device, by[GEMM], by[ATTENTION], elementwise, scaling)


def _gpu(properties) -> Gpu:  # noqa: ANN001
    return Gpu(properties.name, (properties.major, properties.minor), properties.total_memory)
