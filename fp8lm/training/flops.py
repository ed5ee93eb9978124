"""Arithmetic of a training step, and how much of the GPU's peak it reaches.

FLOPs of one step over T tokens in sequences of L_i, the causal half of attention counted; L layers,
hidden size h, q and k the widths of the query and of the key projection, f = 3 matrices in the MLP
with SwiGLU else 2, padded vocabulary V:

    6 T [L (h (q + 2k) + q h + f h ffn) + h V] + 6 L q sum(L_i^2)

Six is two (multiply, add) times three GEMMs (forward, dgrad, wgrad). Recomputation is not counted:
these are the model's FLOPs, not the hardware's. Documents that a sample keeps apart
(`data.reset_attention_mask`) are not counted one by one: L_i is the sample's length, of which
attention then needs less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fp8lm.config import Config, ModelConfig

TERA = 1e12
# Of a layer's GEMMs in a micro-batch, below which FP8 does not pay (tools/crossover.py).
LEAST_FP8_FLOPS = 0.1 * TERA


def training_flops(model: ModelConfig, vocab_size: int, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of forward and backward over sequences of these lengths; `vocab_size` is padded."""
    lengths = list(sequence_lengths)
    of_layers = model.num_layers * model.layer_matrix_parameters
    dense = sum(lengths) * (of_layers + model.hidden_size * vocab_size)
    squares = sum(length**2 for length in lengths)
    attention = model.num_layers * model.query_projection_size * squares
    return 6 * dense + 6 * attention


def layer_flops(config: Config) -> float:
    """FLOPs of the GEMMs of one layer in a micro-batch, forward and backward, on one rank."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    return 6 * tokens * model.layer_matrix_parameters / ranks


def small_gemm_risk(config: Config) -> str | None:
    """What is to be said of GEMMs that are too small for FP8 to pay on a GPU, if they are."""
    flops = layer_flops(config)
    if config.precision.gemm != "fp8" or flops >= LEAST_FP8_FLOPS:
        return None
    return (
        f"the GEMMs of a layer take {flops / TERA:.2g} TFLOP per micro-batch on a rank: below "
        f"{LEAST_FP8_FLOPS / TERA:g} FP8 is predicted to be slower than precision.preset=bf16, or "
        "at most 5 % faster; raise train.micro_batch_size, or use less tensor parallelism"
    )


@dataclass(frozen=True)
class Peak:
    """Dense peak of one GPU in FLOP/s, and what it is the peak of."""

    name: str
    flops: float

    def utilization(self, flops_per_second: float) -> float:
        """The share of the peak that `flops_per_second` per GPU is: MFU."""
        return flops_per_second / self.flops

    def __str__(self) -> str:
        return f"{self.flops / TERA:.0f} TFLOPS, {self.name} dense on H100 and H200"


BF16_PEAK = Peak("BF16", 989 * TERA)
FP8_PEAK = Peak("FP8", 1979 * TERA)


def peak_of(gemm: str, device: torch.device) -> Peak | None:
    """The peak for GEMMs in the format `precision.gemm`; None on a CPU, where none is known."""
    if device.type != "cuda":
        return None
    return FP8_PEAK if gemm == "fp8" else BF16_PEAK


def throughput(flops: float, seconds: float, world_size: int) -> float:
    """TFLOP/s per GPU of `flops` done by `world_size` of them in `seconds`."""
    return flops / seconds / world_size / TERA
