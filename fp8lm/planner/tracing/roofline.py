"""The time of a launch on a device: whichever of memory and arithmetic takes longer.

    seconds = max(bytes / (bandwidth * efficiency), flops / rate, the shortest kernel)

Launches follow each other without gaps, which a host that is fast enough or a CUDA graph provides.
A host that is not sets the pace with `host_launch_us` for each launch.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

import fp8lm
from fp8lm.config.section import Count, NonNegative, Positive, PositiveShare, Section
from fp8lm.config.yaml_format import read_mapping
from fp8lm.planner.tracing.launches import Launch
from fp8lm.planner.tracing.purposes import PURPOSES
from fp8lm.runtime.errors import InputError

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


class Hardware(Section):
    """Rates that kernels reach on a device, not those of its data sheet."""

    name: str
    memory_gb: Positive = Field(description="Memory of a GPU that PyTorch can use, 1e9 bytes.")
    memory_tb_per_s: Positive = Field(description="Bytes read and written by a large copy.")
    bf16_tflops: Positive = Field(description="Matrix products of BF16, and of FP16.")
    fp8_tflops: Positive = Field(description="Matrix products of FP8.")
    fp32_tflops: Positive = Field(description="Matrix products of FP32, without TF32.")
    attention_forward_tflops: Positive = Field(description="Causal attention, half of it counted.")
    attention_backward_tflops: Positive = Field(description="The same in backward.")
    smallest_kernel_us: Positive = Field(description="The time of a kernel that does nothing.")
    host_launch_us: Positive = Field(
        10.0, description="The host's time for a launch, with what PyTorch and Python do around it."
    )
    peak_bf16_tflops: Positive = Field(description="The data sheet's, dense, for MFU.")
    peak_fp8_tflops: Positive = Field(description="The data sheet's, dense, for MFU.")
    gpus_per_node: Count = Field(description="GPUs that NVLink connects.")
    nvlink_gb_per_s: Positive = Field(description="Sent by a GPU to others of its node.")
    network_gb_per_s: Positive = Field(description="Sent by a GPU to other nodes.")
    context_gb: NonNegative = Field(description="Held by CUDA and its libraries.")
    communicator_gb: NonNegative = Field(
        description="Held by NCCL for each group of several ranks that a rank is in."
    )
    efficiency: Mapping[str, PositiveShare] = Field(
        default={},
        description="By purpose, the share of the bandwidth that PyTorch's own kernels reach.",
    )

    @classmethod
    def find(cls, name: str) -> Hardware:
        """A GPU of configs/hardware by its name, or a file like those there by its path."""
        if name.endswith((".yaml", ".yml")):
            return cls.read(Path(name))
        checkout = Path(fp8lm.__file__).parents[1] / "configs/hardware"
        installed = Path(sysconfig.get_path("data"), "share/fp8lm/configs/hardware")
        folder = checkout if checkout.is_dir() else installed
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            raise InputError(
                f"GPU {name!r} is not known: use one of {', '.join(known)}, or a file.yaml like "
                f"those of {folder}"
            )
        return cls.read(folder / f"{name}.yaml")

    @classmethod
    def read(cls, path: Path) -> Hardware:
        """The hardware that the YAML file `path` describes; InputError for a wrong key."""
        try:
            hardware = cls.model_validate(read_mapping(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {key}: {first['msg']}") from None
        unknown = sorted(set(hardware.efficiency) - set(PURPOSES))
        if unknown:
            raise InputError(f"{path}: efficiency.{unknown[0]}: not one of {', '.join(PURPOSES)}")
        return hardware

    def seconds(self, launch: Launch, purpose: str) -> float:
        """The time of one launch."""
        efficiency = 1.0 if launch.declared else self.efficiency.get(purpose, 1.0)
        memory = launch.moved / (self.memory_tb_per_s * TERA * efficiency)
        arithmetic = 0.0
        if launch.unit is not None:
            arithmetic = launch.flops / (getattr(self, f"{launch.unit}_tflops") * TERA)
        return max(memory, arithmetic, self.smallest_kernel_us * MICRO)
