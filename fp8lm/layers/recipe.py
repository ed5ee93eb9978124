"""Which formats a layer's weights, gradients and GEMMs use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.linear import BF16_GEMM, FP8_GEMM, FP32_GEMM, GemmPrecision
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.numerics import BF16, FP32, Format, format_by_name

_GEMMS = {"fp8": FP8_GEMM, "bf16": BF16_GEMM, "fp32": FP32_GEMM}


@dataclass(frozen=True)
class Recipe:
    """Formats of the GEMM weights and their gradients, and those of everything around them.

    `high_precision` is the format of embeddings, norms and biases, and of activations between
    GEMMs; their gradients are fp32. `tp` is the tensor-parallel group of a layer.
    """

    gemm: GemmPrecision
    weight: Format
    weight_grad: Format
    high_precision: Format
    first_last_layers_bf16: bool
    kernels: ReferenceKernels
    device: torch.device
    tp: TPContext = NO_TP

    @classmethod
    def from_config(
        cls,
        precision: PrecisionConfig,
        kernels: ReferenceKernels,
        device: torch.device,
        tp: TPContext = NO_TP,
    ) -> Recipe:
        """The recipe that config section `precision` describes."""
        return cls(
            gemm=_GEMMS[precision.gemm],
            weight=format_by_name(precision.params_dtype),
            weight_grad=format_by_name(precision.main_grads_dtype),
            high_precision=FP32 if precision.gemm == "fp32" else BF16,
            first_last_layers_bf16=precision.first_last_layers_bf16,
            kernels=kernels,
            device=device,
            tp=tp,
        )

    def for_layer(self, index: int, num_layers: int) -> Recipe:
        """The recipe of transformer layer `index` of `num_layers`."""
        if not self.first_last_layers_bf16 or 0 < index < num_layers - 1:
            return self
        gemm = FP32_GEMM if self.high_precision == FP32 else BF16_GEMM
        return replace(self, gemm=gemm, weight=self.high_precision, weight_grad=FP32)
