"""What PyTorch's compiler makes of the reference has the reference's bytes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.compiled import CHUNK, FEWEST, CompiledKernels
from fp8lm.kernels.rounding import ElementIndex
from fp8lm.kernels.select import select_kernels
from fp8lm.numerics import E4M3, E5M2
from fp8lm.runtime.errors import InputError
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.adam_cases import Tensors, coefficients, formats_of, stored_tensors
from tests.kernels.triton.compare import all_bf16_codes, assert_same_values

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
REFERENCE = ReferenceKernels()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled():
    return CompiledKernels()


def numbers_of(x):
    """What is stored, without its scale; codes of formats that PyTorch does not know."""
    return x.payload.view(x.format.dtype).float() if x.format in (E4M3, E5M2) else x.payload


def assert_same_step(kernels, shapes, preset, *, index=None, shrink=1.0, **changes):
    formats, rounding = formats_of(preset)
    ours, expected = (Tensors(shapes, formats, CPU, index=index) for _ in range(2))
    for param in (*ours.params, *expected.params):
        param.master.scale.mul_(shrink)
    if preset == "o4":
        changes["largest_update"] = torch.tensor(1.5)
    table, c = ours.table(rounding), coefficients(CPU, **changes)
    amax, wanted = kernels.adam(ours.params, table, c), REFERENCE.adam(expected.params, table, c)
    assert_same_values(amax, wanted)
    pairs = zip(stored_tensors(ours.params), stored_tensors(expected.params), strict=True)
    for one, other in pairs:
        if one.format.root and not wanted.isfinite().all():
            continue  # its NaN is in the scale alone
        assert_same_values(numbers_of(one), numbers_of(other))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["bf16", "o2", "o3", "o3_long", "o4"])
def test_steps(preset, compiled):
    assert_same_step(compiled, [(2055, 128), (40, 16)], preset)  # the first in two calls
    assert CHUNK < 2055 * 128
    with torch.compiler.set_stance("fail_on_recompile"):  # other sizes, scalars and places
        assert_same_step(compiled, [(2055, 128), (77, 32)], preset, lr=1e-4)
        assert_same_step(compiled, [(2055, 128)], preset, lr=0.0, shrink=2.0**30)  # subnormals
        assert_same_step(compiled, [(300, 64)], preset, index=ElementIndex(77, 8, 40, 1, 2))
        assert_same_step(compiled, [], preset)
        assert_same_step(compiled, [(40, 16)], preset, skip=torch.tensor(False))
        assert_same_step(compiled, [(40, 16)], preset, skip=torch.tensor(True))
        assert_same_step(compiled, [(40, 16)], preset, clip_factor=torch.tensor(math.nan))
        assert_same_step(compiled, [(40, 16)], preset, clip_factor=torch.tensor(math.inf))


def numbers(dtype):
    """All of bf16; as many of fp32 of ten decades, which lie between those of FP8."""
    if dtype == torch.bfloat16:
        return all_bf16_codes().view(256, 256)
    generator = torch.Generator().manual_seed(1)
    decades = torch.empty(256, 256).uniform_(-6, 4, generator=generator)
    x = torch.randn(256, 256, generator=generator) * 10**decades
    x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    return x


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
def test_casts(fmt, dtype, compiled):
    x = numbers(dtype)
    for exponent in (-20, 0, 9):
        scale = torch.tensor(2.0**exponent)
        ours, expected = (
            kernels.cast(x, scale, fmt).view(fmt.dtype).float() for kernels in (compiled, REFERENCE)
        )
        assert_same_values(ours, expected)
    finite = torch.where(x.isfinite(), x, 0.0)
    ours, expected = (kernels.quantize(finite, fmt) for kernels in (compiled, REFERENCE))
    assert torch.equal(ours.payload, expected.payload) and torch.equal(ours.scale, expected.scale)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoded_codes(dtype, compiled):
    codes = torch.arange(256).to(torch.uint8).repeat(FEWEST // 256)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN is in the scale as well
    for scale in (2.0**-30, 1.0, 2.0**100, 2.0**126, math.nan):
        stored = ScaledTensor(codes.view(-1, 64), torch.tensor(scale), E4M3)
        ours, expected = (k.dequantize(stored, dtype) for k in (compiled, REFERENCE))
        assert_same_values(ours, expected)
    turned = ScaledTensor(codes.view(-1, 64).t(), torch.tensor(2.0), E4M3)
    assert torch.equal(compiled.dequantize(turned, dtype), REFERENCE.dequantize(turned, dtype))


@needs_compiler
@pytest.mark.slow
def test_what_is_cast_may_have_a_gradient(compiled):
    x = torch.randn(256, 256, requires_grad=True)
    with torch.enable_grad():
        payload = compiled.cast(x, torch.tensor(1.0), E4M3)
    assert not payload.requires_grad
    assert torch.equal(payload, REFERENCE.cast(x.detach(), torch.tensor(1.0), E4M3))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no-such-compiler.*precision.kernels=eager"):
        select_kernels(CPU, "compiled")


@needs_compiler
def test_pytorchs_compiler_switched_off(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(InputError, match=r"TORCHDYNAMO_DISABLE=1.*unset it"):
        select_kernels(CPU, "compiled")


@needs_compiler
@pytest.mark.slow
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    code = "import torch; from fp8lm.kernels.select import select_kernels as select\n"
    code += "from fp8lm.runtime.ending import exit_with\n"
    code += "exit_with(lambda _: select(torch.device('cpu'), 'compiled') and 0)"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "TORCHINDUCTOR_CACHE_DIR" in ended.stderr
    assert "Traceback" not in ended.stderr


@needs_compiler
@pytest.mark.slow
def test_a_compiler_that_fails(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    command = [sys.executable, "pretrain_gpt.py", "--config", "configs/gpt_tiny.yaml"]
    command += ["precision.kernels=compiled", "train.train_iters=1", f"logging.dir={tmp_path}"]
    environment = {**os.environ, "CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "precision.kernels=compiled" in ended.stderr
    assert "precision.kernels=eager" in ended.stderr
    assert "Traceback" not in ended.stderr
