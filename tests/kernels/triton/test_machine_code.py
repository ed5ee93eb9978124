"""What the compiler makes of the kernels for Hopper: registers, widths of accesses, casts.

A kernel here moves memory and does little else, so that the width of its accesses and the number of
threads that fit decide its speed: 65,536 registers a multiprocessor are 64 for each of 1024.

The bounds hold for Triton 3.7 and 3.9; 3.6 and 3.8 take more registers for some kernels, 3.6 more
barriers too, without spilling.
"""

from importlib.metadata import version

import pytest

pytestmark = pytest.mark.slow

RELEASE = ".".join(version("triton").split(".")[:2])
BARRIERS = 8 if RELEASE == "3.6" else 5  # of the optimizer: none between numbers

ALIGNED = {
    "accumulate_e2m5": (72, 8),
    "accumulate_e4m3": (72, 8),
    "add_in_format": (64, 3),
    "amax": (64, 4),
    "both_orientations_and_sums": (72, 16),
    "both_orientations_e4m3": (72, 16),
    "both_orientations_e5m2": (72, 20),
    "cross_entropy": (64, 2),
    "cross_entropy_backward": (64, 4),
    "dequantize_e4m3": (48, 6),
    "dequantize_fp16": (48, 12),
    "gelu": (48, 4),
    "gelu_backward": (64, 6),
    "gelu_erf": (64, 4),
    "gelu_erf_backward": (64, 6),
    "join": (40, 6),
    "layer_norm": (48, 4),
    "layer_norm_backward": (64, 13),
    "layer_norm_backward_of_wide_rows": (56, 16),
    "layer_norm_of_wide_rows": (40, 12),
    "pack": (64, 10),
    "pack_tokens": (64, 12),
    "quantize_blocks": (64, 6),
    "quantize_e4m3": (48, 6),
    "quantize_rows": (64, 6),
    "rms_norm": (40, 3),
    "rms_norm_backward_of_long_rows": (112, 18),
    "rope": (48, 14),
    "rope_backward": (64, 10),
    "rope_of_grouped_queries": (48, 14),
    "square_sum_e2m5": (96, 1),
    "square_sum_e4m3": (80, 1),
    "sum_in_order": (48, 7),
    "sum_of_replicas": (64, 7),
    "swiglu": (48, 3),
    "swiglu_backward": (64, 5),
    "transpose": (40, 8),
}

OF_PROGRAMS = ("add_parts",)  # add up what programs have left

# Registers; and what of gradient, states and weight moves in 128 bits a thread, and what in 64.
ADAM = {
    "adam_bf16": (64, 7, 1),
    "adam_o1": (64, 4, 2),
    "adam_o3": (80, 4, 4),
    "adam_o3_long": (80, 4, 4),
    "adam_o3_sharded": (80, 4, 4),
    "adam_o4": (80, 2, 6),
}

REGISTERS_OF_RELEASE = {
    "3.6": {
        "both_orientations_and_sums": 106,
        "gelu_erf_backward": 72,
        "layer_norm": 50,
    },
    "3.8": {"accumulate_e2m5": 93, "layer_norm": 54},
}


def allowed(case, registers):
    return REGISTERS_OF_RELEASE.get(RELEASE, {}).get(case, registers)


@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_shapes(case, compiled):
    registers, wide_accesses = ALIGNED[case]
    kernels = compiled[case]
    assert all(kernel.stack == 0 for kernel in kernels)
    assert max(kernel.registers for kernel in kernels) <= allowed(case, registers)
    assert sum(kernel.count(r"(LDG|STG)\.E\.128") for kernel in kernels) >= wide_accesses
    # What is narrow are scales, and what is one number of a program or of a row (a label's logit).
    assert all(kernel.count(r"(LDG|STG)\.E\.U(8|16)") <= 1 for kernel in kernels)
    of_elements = [kernel for kernel in kernels if kernel.name not in OF_PROGRAMS]
    assert all(kernel.count(r"(LDG|STG)\.E(\.64)?$") <= 8 for kernel in of_elements)


def test_no_shape_spills(compiled):
    for kernel in compiled["both_orientations_of_an_odd_shape"]:
        assert kernel.stack == 0
    (kernel,) = compiled["adam_o3_of_an_odd_shape"]
    assert kernel.stack == 0
    assert kernel.registers <= 80


@pytest.mark.parametrize("case", ADAM)
def test_the_optimizer_reads_and_writes_every_tensor_once(case, compiled):
    registers, of_128_bits, of_64_bits = ADAM[case]
    (kernel,) = compiled[case]
    assert kernel.stack == 0
    assert kernel.registers <= allowed(case, registers)
    assert kernel.count(r"(ld|st)\.global\.v4\.b32") == of_128_bits
    assert kernel.count(r"(ld|st)\.global\.v2\.b32") == of_64_bits
    assert kernel.count(r"st\.global\.b") == 0
    assert kernel.count(r"ld\.global\.b8") == 1  # whether the step is skipped
    assert kernel.count(r"bar\.sync") <= BARRIERS  # of the amaxes at the end


@pytest.mark.parametrize("case", ADAM)
def test_the_optimizers_quotients_and_roots_are_rounded_correctly(case, compiled):
    (kernel,) = compiled[case]
    numbers = 4 if case in ("adam_bf16", "adam_o1") else 8  # of a thread
    assert kernel.count(r"sqrt\.rn\.f32") == (2 if case == "adam_o4" else 1) * numbers
    assert kernel.count(r"div\.rn\.f32") >= 3 * numbers
    assert kernel.count(r"(div|sqrt|rcp|rsqrt)\.(approx|full)") == 0


@pytest.mark.parametrize(
    "case, fmt", [("quantize_e4m3", "e4m3"), ("both_orientations_e5m2", "e5m2")]
)
def test_the_hardware_casts_and_saturates(case, fmt, compiled):
    kernel = compiled[case][-1]
    assert kernel.count(rf"cvt\.rn\.satfinite\.{fmt}x2\.f32") >= 16


def test_the_hardware_decodes(compiled):
    assert compiled["dequantize_e4m3"][0].count(r"cvt\.rn\.f16x2\.e4m3x2") >= 8


def test_multiplications_and_additions_are_not_fused(compiled):
    for case, kernels in compiled.items():
        # The logarithm and erf are polynomials.
        if case == "cross_entropy" or case.startswith("gelu_erf"):
            continue
        assert sum(kernel.count(r"fma\.") for kernel in kernels) == 0


def test_launches_of_an_operation(compiled):
    assert len(compiled["accumulate_e4m3"]) == 2
    assert len(compiled["accumulate_e2m5"]) == 1
    assert len(compiled["both_orientations_e5m2"]) == 2
    assert len(compiled["quantize_e4m3"]) == len(compiled["quantize_rows"]) == 1
    assert len(compiled["pack"]) == len(compiled["pack_tokens"]) == 2
    assert len(compiled["join"]) == len(compiled["sum_in_order"]) == 1
