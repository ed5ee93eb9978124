"""Every edge against one process and against its conjugate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.layers.linear import GemmPath
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.recipe import FP8_GEMM, GemmPrecision, OperandScaling
from fp8lm.numerics import E4M3, E5M2, FP32, PER_ROW, PER_TENSOR, Granularity
from tests.parallel.ranks import KERNELS, error, own_rows, random, sent, tensor_parallel

TOKENS, FEATURES = 16, 24
CASES = [(size, sp) for size in (2, 4) for sp in (False, True)]


def inputs(rank, seed):
    """A term of a sum, different on every rank and of different size."""
    return random(TOKENS, FEATURES, seed=seed + rank) * 10.0 ** (rank - 1)


def cast(comm, x, fmt):
    """`x` as a GEMM's operand in `fmt` is sent."""
    return comm.wire_quantizer(Quantizer(fmt, KERNELS), x.dtype)(x)


def conjugates(sequence_parallel):
    """The two sides of sum_r <gather(x)_r, y_r> = sum_r <x_r, reduce(y)_r>."""
    tp = tensor_parallel(sequence_parallel=sequence_parallel, gather="bf16", reduce="bf16")
    comm, x = tp.replicated_side(), own_rows(random(TOKENS, FEATURES, seed=1), tp)
    y = inputs(tp.rank, 50)
    gathered = comm.gather(cast(comm, x, FP32)).wait()
    # Without sequence parallelism all ranks hold x whole: it counts once.
    share = 1.0 if sequence_parallel else 1.0 / tp.size
    x_seen = KERNELS.dequantize(cast(comm, x, FP32))
    sides = torch.stack(
        (
            (KERNELS.dequantize(gathered).double() * y.double()).sum(),
            (x_seen.double() * comm.reduce(y).wait().double()).sum() * share,
        )
    )
    dist.all_reduce(sides)
    return sides


@pytest.mark.parametrize(("size", "sequence_parallel"), CASES)
def test_gather_and_reduce_are_conjugate(run_distributed, size, sequence_parallel):
    for left, right in run_distributed(conjugates, size, sequence_parallel):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def reduce_over(sequence_parallel, precision):
    tp = tensor_parallel(sequence_parallel=sequence_parallel, reduce=precision)
    result = tp.replicated_side().reduce(inputs(tp.rank, 50)).wait()
    expected = own_rows(sum(inputs(rank, 50).double() for rank in range(tp.size)), tp)
    return result, error(result, expected), sent(tp)


@pytest.mark.parametrize(("size", "sequence_parallel"), CASES)
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 1e-6), ("fp8", 0.04)])
def test_reduce_is_the_sum(run_distributed, size, sequence_parallel, precision, bound):
    results = run_distributed(reduce_over, size, sequence_parallel, precision)
    for result, relative, (gathered, reduced) in results:
        assert relative < bound
        assert gathered == 0
        if not sequence_parallel:
            assert torch.equal(result, results[0][0])  # the same bits on every rank
        block = TOKENS * FEATURES // size
        message = block + 16 if precision == "fp8" else 4 * block  # x is fp32
        assert reduced == (size - 1) * message * (1 if sequence_parallel else 2)


def gather_over(precision, fmt):
    tp = tensor_parallel(gather=precision)
    comm = tp.replicated_side()
    whole = random(TOKENS, FEATURES, seed=2)
    # The largest value lies on the last rank: a scale of its own would differ.
    whole[-1, -1] = 1000.0
    whole = whole.bfloat16()
    path = GemmPath(GemmPrecision(fmt, fmt, fmt, torch.bfloat16), KERNELS, comm)
    own, _ = path.input.cast(own_rows(whole, tp), wgrad=False)
    gathered = comm.gather(own).wait()
    return path.input.operand(gathered), KERNELS.quantize(whole, fmt), sent(tp)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_gathered_bytes_and_scale_are_those_of_one_process(run_distributed, size, fmt, precision):
    for gathered, expected, (sent_bytes, reduced) in run_distributed(
        gather_over, size, precision, fmt
    ):
        assert torch.equal(gathered.payload, expected.payload)
        assert gathered.scale == expected.scale
        block = TOKENS * FEATURES // size
        amax = -(-2 * (size - 1) * 4 // size)  # all-reduce of one fp32
        message = (size - 1) * block
        assert sent_bytes == (message + amax if precision == "fp8" else 2 * message)
        assert reduced == 0


GRANULARITIES = [PER_ROW, Granularity(1, 4), Granularity(4, 4)]


def operands_of(precision, granularity):
    """Of an input and an output gradient: both operands, and one process's scales and values."""
    tp = tensor_parallel(gather=precision)
    comm, scaling = tp.replicated_side(), OperandScaling(granularity, PER_TENSOR, granularity)
    whole = (random(TOKENS, FEATURES, seed=2) * torch.logspace(-3, 3, TOKENS)[:, None]).bfloat16()
    path = GemmPath(replace(FP8_GEMM, scaling=scaling), KERNELS, comm, comm)
    own, for_wgrad = path.input.cast(own_rows(whole, tp), wgrad=True)
    found = [
        path.input.operand(comm.gather(own).wait()),
        path.input.transposed_operand(comm.gather(for_wgrad).wait()),
        *path.grad_output.both(own_rows(whole, tp), wgrad=True),
    ]
    one = [KERNELS.quantize(x, E4M3, granularity=granularity) for x in (whole, whole.t())]
    one += [KERNELS.quantize(x, E5M2, granularity=granularity) for x in (whole, whole.t())]
    return [(x.scale, KERNELS.dequantize(x)) for x in found], [
        (x.scale, KERNELS.dequantize(x)) for x in one
    ]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_gathered_operands_have_the_scales_of_one_process(run_distributed, granularity, precision):
    for found, one in run_distributed(operands_of, 2, precision, granularity):
        for (scale, values), (expected_scale, expected) in zip(found, one, strict=True):
            assert torch.equal(scale, expected_scale) and torch.equal(values, expected)


def gather_a_fault(bad_rank):
    tp = tensor_parallel()
    x = random(TOKENS // tp.size, FEATURES, seed=3).bfloat16()
    if tp.rank == bad_rank:
        x[0, 0] = float("nan")
    comm = tp.replicated_side()
    return KERNELS.dequantize(comm.gather(cast(comm, x, E4M3)).wait())


def test_a_fault_on_one_rank_is_gathered_by_all(run_distributed):
    for gathered in run_distributed(gather_a_fault, 2, 1):
        assert gathered.isnan().all()


def partition_over():
    tp = tensor_parallel()
    parts = [torch.full((3,), 1.0 + tp.rank), torch.full((2, 2), 10.0 * tp.rank)]
    tp.sum_in_place(parts)
    values = torch.tensor([1.0 + tp.rank, 5.0 - tp.rank])
    return parts, tp.max(values), tp.gather(values)


def test_partition(run_distributed):
    for (first, second), largest, gathered in run_distributed(partition_over, 2):
        assert first.tolist() == [3.0] * 3
        assert second.tolist() == [[10.0] * 2] * 2
        assert largest.tolist() == [2.0, 5.0]
        assert gathered.tolist() == [[1.0, 5.0], [2.0, 4.0]]


def gather_in_each_replica():
    """Two replicas of two ranks; what the second gathers is 1000 times larger."""
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        tp = replace(tensor_parallel(), group=groups.tensor_parallel)
        size = 1000.0 if groups.data_parallel.rank() else 1.0
        whole = (random(TOKENS, FEATURES, seed=4) * size).bfloat16()
        comm = tp.replicated_side()
        gathered = comm.gather(cast(comm, own_rows(whole, tp), E4M3)).wait()
    return gathered, KERNELS.quantize(whole, E4M3)


def test_scales_are_shared_within_the_tensor_parallel_group_only(run_distributed):
    results = run_distributed(gather_in_each_replica, 4)
    for gathered, expected in results:
        assert gathered.scale == expected.scale
        assert torch.equal(gathered.payload, expected.payload)
    assert len({gathered.scale.item() for gathered, _ in results}) == 2


def bytes_of(precision, sequence_parallel):
    tp = tensor_parallel(sequence_parallel=sequence_parallel, gather=precision, reduce=precision)
    comm, y = tp.replicated_side(), random(64, 64, seed=5).bfloat16()
    comm.gather(cast(comm, own_rows(y, tp), E4M3)).wait()
    comm.reduce(y).wait()
    return sum(sent(tp))


@pytest.mark.parametrize(("size", "sequence_parallel"), CASES)
def test_fp8_wires_send_half_the_bytes(run_distributed, size, sequence_parallel):
    fp8, bf16 = (
        run_distributed(bytes_of, size, precision, sequence_parallel)[0]
        for precision in ("fp8", "bf16")
    )
    assert bf16 / 2 < fp8 <= 0.51 * bf16
