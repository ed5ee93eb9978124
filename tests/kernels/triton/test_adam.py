"""The step of many tensors at once gives the reference's bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fp8lm.config.precision import PRESETS
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.rounding import ElementIndex, Rounding
from fp8lm.kernels.triton.adam import CHUNK
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.kernels.triton.tensor_table import TensorTable
from fp8lm.numerics import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    FP32,
    ROOT_E4M4,
)
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.adam_cases import Tensors, coefficients, formats_of, stored_tensors
from tests.kernels.triton.compare import assert_same_values
from tests.kernels.triton.traffic import counting
from tests.optim.bench import optimizer, step, weights

pytestmark = pytest.mark.slow

REFERENCE = ReferenceKernels()
SHAPES = [(65, 128), (3, 5), (17, 37), (1, 1), (24, 40)]  # the first has two chunks
SUBNORMALS, STOCHASTIC, NEAREST = (
    Rounding.STOCHASTIC_SUBNORMALS,
    Rounding.STOCHASTIC,
    Rounding.NEAREST,
)
# Table 6 of FP8-LM and what else a config can ask for: gradient, weight, master, m, v.
FORMATS = {
    "#0": (FP32, FP32, FP32, FP32, FP32),
    "#2b": (E4M3, E4M3, BF16, E4M3, FP16),
    "#3": (E4M3, E4M3, E4M3, E4M3, FP16),
    "#4": (E4M3, E4M3, FP16, E4M3, E4M3),
    "bf16 moments": (BF16, FP16, FP16, BF16, BF16),
    "e5m2 moments": (BF16, FP16, FP32, E5M2, E5M2),
    "fp16 moments": (FP32, BF16, FP16, FP16, FP16),
    "root": (BF16, E4M3, None, E5M2, ROOT_E4M4),
}


def assert_same_step(shapes, formats, device, rounding=(STOCHASTIC, SUBNORMALS, NEAREST), **other):
    """Of Triton and of the reference; returns both sets of tensors."""
    changes = other.pop("changes", {})
    ours, expected = (Tensors(shapes, formats, device, **other) for _ in range(2))
    table, c = ours.table(rounding), coefficients(device, **changes)
    amax = TritonKernels().adam(ours.params, table, c)
    assert_same_values(amax, REFERENCE.adam(expected.params, table, c).cpu())
    pairs = zip(stored_tensors(ours.params), stored_tensors(expected.params), strict=True)
    for one, other in pairs:
        assert_same_values(one.payload, other.payload.cpu())
    return ours, expected


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, device):
    formats, rounding = formats_of(preset)
    cut_off = torch.tensor(1.5, device=device) if preset == "o4" else None
    changes = {"largest_update": cut_off}
    assert max(map(math.prod, SHAPES)) > CHUNK
    assert_same_step(SHAPES, formats, device, rounding, changes=changes)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, SUBNORMALS])
@pytest.mark.parametrize("setting", FORMATS)
def test_every_format_and_rounding(setting, rounding, device):
    assert_same_step([(24, 40), (7, 9)], FORMATS[setting], device, (rounding,) * 3)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3])
def test_gradients_of_every_size(scale, device):
    for setting in ("#0", "#2b", "root"):
        assert_same_step([(24, 40)], FORMATS[setting], device, scale=scale)


def test_subnormals_of_fp16(device):
    """Their noise has 13 bits; so many elements that more bits give other bytes."""
    assert_same_step([(256, 128)], FORMATS["fp16 moments"], device, (STOCHASTIC,) * 3, scale=1e-9)


@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.6])
def test_both_ends_of_the_average(beta1, device):
    assert_same_step([(24, 40)], FORMATS["#0"], device, changes={"beta1": beta1})


@pytest.mark.parametrize(
    "index",
    [
        ElementIndex(0, 5, 1, 3, 8),
        ElementIndex(77, 8, 40, 0, 2),
        ElementIndex(900, 31, 41, 1, 2),
        ElementIndex(4096, 50, 128, 1, 4),
        ElementIndex(2**31 - 5000, 2**20, 4096, 2, 3),
        ElementIndex(2**33 + 8, 1),
    ],
    ids=str,
)
def test_noise_of_a_shard(index, device):
    formats, rounding = formats_of("o4")
    ours, _ = assert_same_step([(12, 128)], formats, device, rounding, index=index)
    other = Tensors([(12, 128)], formats, device)
    TritonKernels().adam(other.params, other.table(rounding), coefficients(device))
    assert not torch.equal(ours.params[0].master.payload, other.params[0].master.payload)


def test_nothing_and_zeros(device):
    formats, rounding = formats_of("o3")
    assert_same_step([], formats, device, rounding)
    assert_same_step([(0, 16), (3, 16), (0, 16)], formats, device, rounding)
    ours, _ = assert_same_step([(3, 16), (8, 16)], formats, device, rounding, scale=0.0)
    assert not REFERENCE.dequantize(ours.params[0].exp_avg).any()


def test_what_lies_beside_a_tensor_stays(device):
    """Weights are parts of one buffer, and so at any place in memory."""
    formats, rounding = formats_of("o3")
    ours, expected = (Tensors([(5, 33), (4, 16)], formats, device) for _ in range(2))
    buffer, start = torch.full((600,), 0x55, dtype=torch.uint8, device=device), 3
    for number, param in enumerate(ours.params):
        payload = buffer[start : start + param.gradient.payload.numel()]
        moved = ScaledTensor(payload.view(param.gradient.shape), param.model_param.scale, E4M3)
        ours.params[number] = replace(param, model_param=moved.copy_(param.model_param))
        start += payload.numel() + 8
    table, c = ours.table(rounding), coefficients(device)
    REFERENCE.adam(expected.params, table, c)
    TritonKernels().adam(ours.params, table, c)
    between = [buffer[:3], buffer[168:176], buffer[240:]]
    assert all((part == 0x55).all() for part in between)
    for one, other in zip(ours.params, expected.params, strict=True):
        assert_same_values(one.model_param.payload, other.model_param.payload.cpu())


@pytest.mark.parametrize("preset", ["bf16", "o2", "o3_long", "o4"])
def test_a_skipped_step_keeps_every_byte(preset, device):
    formats, rounding = formats_of(preset)
    ours, before = (Tensors([(24, 40), (3, 5)], formats, device) for _ in range(2))
    ours.params[0].gradient.scale.fill_(math.nan)
    kernels, table = TritonKernels(), ours.table(rounding)
    kernels.adam(ours.params, table, coefficients(device, skip=torch.tensor(True, device=device)))
    pairs = zip(stored_tensors(ours.params), stored_tensors(before.params), strict=True)
    for one, other in pairs:
        assert_same_values(one.payload, other.payload.cpu())
    kernels.adam(ours.params, table, coefficients(device, skip=torch.tensor(False, device=device)))
    assert not torch.equal(ours.params[1].master.payload, before.params[1].master.payload)


@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_an_event_reaches_the_amax(event, device):
    formats = (FP32, E4M3, FP16, E4M3, FP16)
    tensors = Tensors([(24, 40), (24, 40)], formats, device)
    tensors.params[0].gradient.payload[20, 30] = event
    table = tensors.table((STOCHASTIC, SUBNORMALS, NEAREST))
    amax = TritonKernels().adam(tensors.params, table, coefficients(device))
    assert not amax[0].isfinite().any()
    assert amax[1].isfinite().all()


def test_gradients_that_move(device):
    """The tables of addresses are kept, as long as they are right."""
    formats, rounding = formats_of("o3")
    ours, expected = (Tensors([(24, 40), (3, 5), (7, 16)], formats, device) for _ in range(2))
    kernels, c = TritonKernels(), coefficients(device)
    for number in range(3):
        table = ours.table(rounding)
        if number:
            param = replace(ours.params[number - 1])
            ours.params[number - 1] = replace(param, gradient=param.gradient.clone())
        if number == 2:
            del ours.params[1], expected.params[1]
        kernels.adam(ours.params, table, c)
        REFERENCE.adam(expected.params, table, c)
        pairs = zip(stored_tensors(ours.params), stored_tensors(expected.params), strict=True)
        for one, other in pairs:
            assert_same_values(one.payload, other.payload.cpu())


def test_a_table_is_copied_where_it_changes(device):
    table = TensorTable()
    table.update([(10, 20), (30, 40)], [3, 1], device)
    assert table.rows.tolist() == [[0, 10, 20], [3, 30, 40]]
    assert table.owners.tolist() == [0, 0, 0, 1]
    rows, owners = table.rows, table.owners
    table.update([(10, 20), (30, 40)], [3, 1], device)
    assert table.rows is rows and table.owners is owners
    table.update([(10, 21), (30, 40)], [3, 1], device)
    assert table.rows[0].tolist() == [0, 10, 21] and table.owners is owners
    table.update([(10, 21), (30, 40)], [1, 2], device)
    assert table.rows[:, 0].tolist() == [0, 1] and table.owners.tolist() == [0, 1, 1]


def test_a_strided_payload_is_refused(device):
    tensors = Tensors([(24, 40)], FORMATS["#0"], device)
    master = tensors.params[0].master
    tensors.params[0] = replace(tensors.params[0], master=master.t())
    with pytest.raises(ValueError, match="contiguous"):
        TritonKernels().adam(tensors.params, tensors.table((NEAREST,) * 3), coefficients(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize(
    ("preset", "of_each"), [("bf16", 30), ("o2", 11), ("o3", 12), ("o3_long", 12), ("o4", 10)]
)
def test_declared_traffic(preset, of_each):
    formats, rounding = formats_of(preset)
    shapes = [(12, 128), (8, 144)]
    tensors = Tensors(shapes, formats, torch.device("cpu"), index=ElementIndex())
    tensors.params[1] = replace(tensors.params[1], weight_decay=0.1)
    if preset == "o3_long":  # one length of blocks
        shapes, tensors.params = shapes[:1], tensors.params[:1]
    changes = {"skip": torch.tensor(False), "largest_update": torch.tensor(2.0)}
    with counting() as traffic:
        TritonKernels().adam(
            tensors.params, tensors.table(rounding), coefficients("cpu", **changes)
        )
    assert traffic.measured == traffic.declared
    ((_, reads, writes),) = traffic.declared
    numel = sum(map(math.prod, shapes))
    scales = 4 * numel // 128 if preset == "o3_long" else 0
    assert (
        of_each * numel + scales <= reads + writes <= of_each * numel + scales + 400 * len(shapes)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_launches_of_an_optimizer():
    """A matrix, an embedding and a vector differ in formats and in decay."""
    adam = optimizer(weights())
    adam.kernels = TritonKernels()
    with counting() as traffic:
        step(adam, 0)
    assert traffic.measured == traffic.declared
    assert [name for name, _, _ in traffic.declared].count("adam_chunk") == 3
