"""GEMMs of decoded operands against float64, and the operands that tensor cores refuse."""

from __future__ import annotations

import sys

import pytest
import torch

from fp8lm.config import PrecisionConfig, build_config
from fp8lm.kernels import ReferenceKernels, select_kernels
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.interface import ELEMENTWISE, GEMM
from fp8lm.kernels.reference import check_gemm_operands
from fp8lm.kernels.select import (
    check_blocks_on_gpu,
    check_scaling,
    check_scaling_on_gpu,
    describe_scaling,
    kernels_for_gpu,
)
from fp8lm.numerics import (
    BF16,
    BLOCK_1X128,
    BLOCK_128X128,
    E4M3,
    E5M2,
    FP16,
    FP32,
    MX_1X32,
    PER_ROW,
    PER_TENSOR,
    Granularity,
)
from fp8lm.runtime.errors import InputError
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
FP8_PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)]
OUTPUTS = [
    *((formats, dtype) for formats in FP8_PAIRS for dtype in (torch.bfloat16, torch.float32)),
    ((BF16, BF16), torch.bfloat16),
    ((FP32, FP32), torch.float32),
]


def operand(rows, columns, fmt, *, seed, amplitude=1.0):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return KERNELS.quantize(x * amplitude, fmt)


def exact_product(a, b):
    """(product, product of magnitudes) of the dequantized operands in float64."""
    a, b = (KERNELS.dequantize(x).double() for x in (a, b))
    return a @ b.t(), a.abs() @ b.abs().t()


@pytest.mark.parametrize(("formats", "out_dtype"), OUTPUTS, ids=repr)
@pytest.mark.parametrize("amplitudes", [(1.0, 1.0), (1e-6, 300.0), (1e5, 1e5)])
def test_product(formats, out_dtype, amplitudes):
    a = operand(48, 64, formats[0], seed=1, amplitude=amplitudes[0])
    b = operand(32, 64, formats[1], seed=2, amplitude=amplitudes[1])
    result = KERNELS.gemm(a, b, out_dtype=out_dtype)
    product, magnitude = exact_product(a, b)
    # One rounding of the output, and the fp32 roundings of 64 additions.
    bound = torch.finfo(out_dtype).eps / 2 * product.abs() + 64 * 2.0**-24 * magnitude
    assert (result.dtype, result.shape) == (out_dtype, (48, 32))
    assert ((result.double() - product).abs() <= bound).all()


@pytest.mark.parametrize("formats", FP8_PAIRS, ids=repr)
@pytest.mark.parametrize("fast_accumulation", [False, True])
def test_small_integers_are_exact(formats, fast_accumulation):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-2, 3, (16, 48), generator=generator).float() for _ in range(2))
    operands = (KERNELS.quantize(x, fmt) for x, fmt in zip((a, b), formats, strict=True))
    result = KERNELS.gemm(*operands, fast_accumulation=fast_accumulation)
    assert torch.equal(result.float(), a @ b.t())  # at most 192: bf16 counts to 256


def test_accumulates_in_fp32():
    # 256 + 16 * 1: in bf16 256 + 1 is 256.
    a = torch.ones(16, 32)
    a[:, 0] = 256.0
    b = torch.ones(16, 32)
    b[:, 17:] = 0.0
    product = KERNELS.gemm(KERNELS.quantize(a, E4M3), KERNELS.quantize(b, E4M3))
    assert (product == 272.0).all()


@pytest.mark.parametrize("formats", FP8_PAIRS, ids=repr)
def test_transposed_views(formats):
    a = operand(48, 64, formats[0], seed=4)
    b = operand(48, 32, formats[1], seed=5)
    contiguous = (ScaledTensor(x.payload.t().contiguous(), x.scale, x.format) for x in (a, b))
    expected = KERNELS.gemm(*contiguous)
    assert torch.equal(KERNELS.gemm(a.t(), b.t()), expected)


@pytest.mark.parametrize("which", [0, 1])
def test_nan_scale_reaches_every_element(which):
    operands = [operand(16, 16, E4M3, seed=6), operand(16, 16, E4M3, seed=7)]
    operands[which].scale.fill_(torch.nan)
    assert KERNELS.gemm(*operands).isnan().all()


def zeros(rows, columns, fmt):
    return ScaledTensor.zeros((rows, columns), fmt, CPU)


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ((16, 32, E5M2), (16, 32, E5M2), "E5M2 by E5M2"),
        ((16, 32, E4M3), (16, 48, E4M3), "contraction differs"),
        ((16, 32, BF16), (16, 48, BF16), "contraction differs"),
        ((8, 32, E4M3), (16, 32, E4M3), "divisible by 16"),
        ((16, 32, E4M3), (24, 32, E4M3), "divisible by 16"),
        ((16, 40, E5M2), (16, 40, E4M3), "divisible by 16"),
    ],
)
def test_refused_operands(a, b, complaint):
    for refuse in (check_gemm_operands, KERNELS.gemm, HopperKernels().gemm):
        with pytest.raises(ValueError, match=complaint):
            refuse(zeros(*a), zeros(*b))


@pytest.mark.parametrize("fmt", [BF16, FP16, FP32], ids=repr)
def test_other_formats_have_no_restriction_of_size(fmt):
    check_gemm_operands(zeros(3, 5, fmt), zeros(7, 5, fmt))


def test_cpu_gets_the_reference():
    assert type(select_kernels(CPU)) is ReferenceKernels


def test_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(InputError, match=r"A100 has compute capability 8\.0; .* need 8\.9"):
        select_kernels(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_gpu_with_fp8_multiplies_on_tensor_cores(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert type(select_kernels(torch.device("cuda", 0), "eager")) is HopperKernels
    fused = select_kernels(torch.device("cuda", 0))
    assert fused.backends[GEMM] == HopperKernels().backends[GEMM]


def test_triton_where_it_can_be_imported(monkeypatch):
    pytest.importorskip("triton")
    by_name = {name: kernels_for_gpu((9, 0), "H100", name) for name in ("auto", "triton", "eager")}
    assert type(by_name["auto"]) is type(by_name["triton"]) is not HopperKernels
    assert by_name["auto"].backends[ELEMENTWISE].startswith("fused Triton kernels")
    monkeypatch.setitem(sys.modules, "fp8lm.kernels.triton.backend", None)  # fails to import
    assert type(kernels_for_gpu((9, 0), "H100")) is HopperKernels
    with pytest.raises(
        InputError, match=r"pip install .*triton.*, or use precision\.kernels=eager"
    ):
        kernels_for_gpu((9, 0), "H100", "triton")


def test_triton_is_refused_on_a_cpu():
    assert type(select_kernels(CPU, "eager")) is ReferenceKernels
    with pytest.raises(InputError, match=r"precision\.kernels=triton needs a GPU"):
        select_kernels(CPU, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FP8_PAIRS, ids=repr)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fast_accumulation", [False, True])
def test_tensor_cores_match_the_reference(formats, transposed, fast_accumulation):
    a, b = operand(64, 64, formats[0], seed=8), operand(64, 64, formats[1], seed=9)
    if transposed:
        a, b = (HopperKernels().transpose(x) for x in (a, b))
    on_gpu = (ScaledTensor(x.payload.cuda(), x.scale.cuda(), x.format) for x in (a, b))
    result = HopperKernels().gemm(*on_gpu, fast_accumulation=fast_accumulation).cpu()
    product, magnitude = exact_product(a, b)
    # Hopper adds products in 14 bits (fast: over the whole sum).
    bound = 2.0**-8 * product.abs() + 64 * 2.0**-14 * magnitude
    assert ((result.double() - product).abs() <= bound).all()


@pytest.mark.parametrize("formats", FP8_PAIRS, ids=repr)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_handed_to_cublas_is_the_product_of_the_values(formats, transposed):
    """PyTorch has `_scaled_mm` on a CPU as well: scales are reciprocals, b a column-major view."""
    a = operand(48, 64, formats[0], seed=10, amplitude=1e-6)
    b = operand(32, 64, formats[1], seed=11, amplitude=300.0)
    assert a.scale != 1.0 != b.scale
    if transposed:
        a, b = (HopperKernels().transpose(x.t()) for x in (a, b))
    result = HopperKernels().gemm(a, b)
    expected = KERNELS.gemm(a, b)
    torch.testing.assert_close(result, expected, rtol=2.0**-7, atol=2.0**-7 * expected.abs().max())


@pytest.mark.parametrize("kernels", [KERNELS, HopperKernels()], ids=["reference", "hopper"])
@pytest.mark.parametrize("formats", [*FP8_PAIRS, (BF16, BF16)], ids=repr)
def test_bias_is_added_to_every_row(kernels, formats):
    a, b = operand(48, 64, formats[0], seed=14), operand(32, 64, formats[1], seed=15)
    bias = 8 * torch.randn(32, generator=torch.Generator().manual_seed(16)).bfloat16()
    product, magnitude = exact_product(a, b)
    # Two roundings to bf16 at most, of the product and of the sum.
    bound = 2.0**-8 * (product.abs() + (product + bias).abs()) + 64 * 2.0**-14 * magnitude
    result = kernels.gemm(a, b, bias=bias).double()
    assert ((result - (product + bias)).abs() <= bound).all()


def test_operands_are_not_copied_unseen():
    a, b = operand(48, 64, E4M3, seed=10), operand(32, 64, E4M3, seed=11)
    strided = ScaledTensor(a.payload.t().contiguous().t(), a.scale, a.format)
    with pytest.raises(ValueError, match="not contiguous"):
        HopperKernels().gemm(strided, b)
    with pytest.raises(ValueError, match="not contiguous"):
        HopperKernels().gemm(b, strided)


UNABLE = [
    (PER_TENSOR, BLOCK_1X128, "no GEMM of scales per tensor by scales blocks of 1 x 128"),
    (PER_ROW, BLOCK_128X128, "no GEMM"),
    (BLOCK_128X128, BLOCK_128X128, "no GEMM"),
    (MX_1X32, MX_1X32, "no GEMM"),
]


@pytest.mark.parametrize(("of_a", "of_b", "says"), UNABLE, ids=str)
def test_scales_that_cublas_has_no_gemm_for(of_a, of_b, says):
    a, b = (KERNELS.quantize(torch.randn(128, 256), E4M3, granularity=g) for g in (of_a, of_b))
    with pytest.raises(ValueError, match=says):
        HopperKernels().gemm(a, b)
    assert KERNELS.gemm(a, b).shape == (128, 128)


ABLE = [
    (PER_ROW, PER_ROW),
    (PER_ROW, PER_TENSOR),
    (BLOCK_1X128, BLOCK_1X128),
    (BLOCK_1X128, BLOCK_128X128),
    (BLOCK_128X128, BLOCK_1X128),
]


@pytest.mark.parametrize(("of_a", "of_b"), ABLE, ids=str)
@pytest.mark.parametrize("contraction", [128, 640])  # blocks that cuBLASLt wants padded to four
def test_cublas_takes_the_layout_of_scales(of_a, of_b, contraction):
    meta = torch.device("meta")  # where PyTorch checks it as CUDA does
    a = ScaledTensor.zeros((256, contraction), E5M2, meta, of_a)
    b = ScaledTensor.zeros((384, contraction), E4M3, meta, of_b)
    bias = torch.zeros(384, dtype=torch.bfloat16, device=meta)
    assert HopperKernels().gemm(a, b, bias=bias).shape == (256, 384)


@pytest.mark.gpu
@pytest.mark.parametrize(("of_a", "of_b"), ABLE, ids=str)
def test_tensor_cores_match_the_reference_with_scales_of_rows_and_blocks(of_a, of_b):
    sizes = zip((256, 384), (E5M2, E4M3), (of_a, of_b), strict=True)
    a, b = (
        KERNELS.quantize(
            torch.randn(n, 640) * torch.logspace(-2, 2, 640), fmt, granularity=granularity
        )
        for n, fmt, granularity in sizes
    )
    on_gpu = (
        ScaledTensor(x.payload.cuda(), x.scale.cuda(), x.format, x.granularity) for x in (a, b)
    )
    product, magnitude = exact_product(a, b)
    bound = 2.0**-8 * product.abs() + 640 * 2.0**-14 * magnitude
    assert ((HopperKernels().gemm(*on_gpu).cpu().double() - product).abs() <= bound).all()


@pytest.mark.parametrize(
    ("capability", "cuda", "preset", "says"),
    [
        ((9, 0), "12.8", "deepseek", "CUDA 12.9 or newer, and torch is built for 12.8"),
        ((10, 0), "13.0", "deepseek", "compute capability 9.0"),
        ((9, 0), "12.9", "mxfp8", "MXFP8's tensor cores are Blackwell's"),
    ],
)
def test_a_gpu_that_lacks_a_recipes_gemms_is_refused_at_the_start(capability, cuda, preset, says):
    with pytest.raises(InputError, match=f"precision.scaling.input = .*{says}"):
        check_scaling_on_gpu(capability, cuda, PrecisionConfig(preset=preset))
    assert "not: " in describe_scaling(capability, cuda)
    check_scaling_on_gpu((9, 0), "12.9", PrecisionConfig(preset="deepseek"))
    check_scaling_on_gpu(capability, cuda, PrecisionConfig(preset="te"))
    check_scaling(CPU, config_of(64, preset=preset))


def config_of(hidden_size, seq_length=128, **precision):
    model = {"num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 256}
    return build_config(
        {
            "model": model | {"hidden_size": hidden_size, "seq_length": seq_length},
            "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 2},
            "optimizer": {"lr": 1e-3},
            "scheduler": {"lr_warmup_iters": 0},
            "data": {"mock_data": True},
            "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 63},
            "precision": precision,
        }
    )


def test_blocks_that_a_gpu_would_cut_are_refused_at_the_start():
    """On a CPU the last block may be a part of one."""
    with pytest.raises(InputError, match=r"model.hidden_size = 64 .*precision.scaling.input = blo"):
        check_blocks_on_gpu(config_of(64, preset="deepseek"))
    short = config_of(256, seq_length=64, preset="deepseek")
    with pytest.raises(InputError, match=r"model.seq_length .* = 64 is not a multiple of 128"):
        check_blocks_on_gpu(short)
    check_blocks_on_gpu(short, trains=False)  # forward contracts no tokens
    check_blocks_on_gpu(config_of(256, preset="deepseek"))
    check_blocks_on_gpu(config_of(64, preset="te"))
    check_blocks_on_gpu(config_of(64, preset="deepseek", gemm="bf16"))


def test_scales_of_blocks_multiply_the_sums_of_blocks():
    """DeepSeek-V3's order: codes, their sum over a block, its scales, then the sum over blocks.

    Integers, so that no sum is rounded and the order of the rest does not matter.
    """
    generator = torch.Generator().manual_seed(3)
    codes = [torch.randint(-3, 4, (32, 256), generator=generator).float() for _ in range(2)]
    blocks = Granularity(1, 128)
    powers = [2.0 ** torch.randint(-3, 4, (32, 2), generator=generator) for _ in range(2)]
    a, b = (
        ScaledTensor(KERNELS.cast(code, torch.ones(()), E4M3), power, E4M3, blocks)
        for code, power in zip(codes, powers, strict=True)
    )
    total = torch.zeros(32, 32)
    for block in range(2):
        part = slice(128 * block, 128 * (block + 1))
        sums = codes[0][:, part] @ codes[1][:, part].t()
        total += sums / powers[0][:, block, None] / powers[1][None, :, block]
    assert torch.equal(KERNELS.gemm(a, b, out_dtype=torch.float32), total)


@pytest.mark.parametrize("granularity", [PER_ROW, Granularity(1, 16), Granularity(16, 32)], ids=str)
def test_product_of_blocks(granularity):
    x, y = (torch.randn(48, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    a = KERNELS.quantize(x, E5M2, granularity=granularity)
    b = KERNELS.quantize(y, E4M3, granularity=granularity)
    product, magnitude = exact_product(a, b)
    bound = 2.0**-8 * product.abs() + 64 * 2.0**-24 * magnitude  # as `test_product`
    assert ((KERNELS.gemm(a, b).double() - product).abs() <= bound).all()


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_their_own_scale_on_tensor_cores(bias):
    """Every row is the product of that row alone, whatever the size of the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 64, generator=generator) * 10.0 ** torch.linspace(-20, 20, 16)[:, None]
    a, b = KERNELS.quantize(x, E4M3, granularity=PER_ROW), operand(32, 64, E4M3, seed=4)
    added = torch.randn(32, generator=generator).bfloat16() if bias else None
    expected = KERNELS.gemm(a, b, bias=added)
    try:
        result = HopperKernels().gemm(a, b, bias=added)
    except RuntimeError as error:  # PyTorch 2.11
        if "only supports per-tensor scaling for CPU" in str(error):
            pytest.skip("this PyTorch multiplies rows of their own scale on GPUs only")
        raise
    bound = 2.0**-7 * expected.abs() + 2.0**-7 * expected.abs().amax(dim=1, keepdim=True)
    assert ((result - expected).abs() <= bound).all()
    a.scale[3] = torch.nan
    result = HopperKernels().gemm(a, b)
    assert result[3].isnan().all() and result[4:].isfinite().all()


@pytest.mark.parametrize("fast_accumulation", [False, True])
def test_fast_accumulation_is_passed_on(monkeypatch, fast_accumulation):
    asked = []

    def record(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        asked.append((use_fast_accum, out_dtype, scale_a.item(), scale_b.item()))
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", record)
    a, b = operand(16, 32, E4M3, seed=12), operand(16, 32, E4M3, seed=13, amplitude=7.0)
    HopperKernels().gemm(a, b, fast_accumulation=fast_accumulation)
    scales = [1.0 / x.scale.item() for x in (a, b)]
    assert asked == [(fast_accumulation, torch.bfloat16, *scales)]


def test_partial_sums_of_bf16_gemms_on_a_gpu_are_fp32():
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    kernels_for_gpu((9, 0), "H100", "eager")
    assert not matmul.allow_bf16_reduced_precision_reduction
