"""Messages between stages: a scale per token, exact bytes, faults that arrive as faults."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.numerics import E4M3
from tests.parallel.ranks import KERNELS, random

SHAPE = (6, 2, 32)


def wire(precision, dtype=torch.bfloat16, shape=SHAPE):
    return PipelineP2P(shape, dtype, Wire("pipeline", precision, WireCounter()), KERNELS)


def outliers():
    """Tokens of very different sizes."""
    sizes = torch.logspace(-6, 4, 12).view(6, 2, 1)
    return (random(*SHAPE, seed=1) * sizes).bfloat16()


def test_every_token_is_cast_on_its_own():
    x = outliers()
    arrived = wire("fp8").unpack(wire("fp8").pack(x))
    for i in range(6):
        for j in range(2):
            alone = KERNELS.dequantize(KERNELS.quantize(x[i, j].float(), E4M3))
            assert torch.equal(arrived[i, j].float(), alone)


def test_small_tokens_survive_beside_large_ones():
    x = outliers()
    arrived = wire("fp8").unpack(wire("fp8").pack(x)).float()
    error = (arrived - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
    assert error.max() < 2**-4  # E4M3's relative step, whatever the token's size
    one_scale = KERNELS.dequantize(KERNELS.quantize(x.float(), E4M3))
    assert not one_scale[0].any()


@pytest.mark.parametrize(
    ("precision", "dtype", "nbytes"),
    [
        ("fp8", torch.bfloat16, 12 * (32 + 4)),
        ("bf16", torch.bfloat16, 12 * 64),
        ("bf16", torch.float32, 12 * 128),
    ],
)
def test_size_of_a_message(precision, dtype, nbytes):
    made = wire(precision, dtype)
    message = made.pack(outliers().to(dtype))
    assert (message.dtype, message.numel(), made.nbytes) == (torch.uint8, nbytes, nbytes)
    arrived = made.unpack(message)
    assert (arrived.dtype, tuple(arrived.shape)) == (dtype, SHAPE)
    if precision == "bf16":
        assert torch.equal(arrived, outliers().to(dtype))


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_stays_in_its_token(fault):
    x = outliers()
    x[3, 1, 7] = fault
    arrived = wire("fp8").unpack(wire("fp8").pack(x))
    assert arrived[3, 1].isnan().all()
    x[3, 1] = 0.0
    assert not arrived[(x != 0).any(-1)].isnan().any()


def test_zero_tokens():
    message = wire("fp8").pack(torch.zeros(SHAPE))
    assert not wire("fp8").unpack(message).any()
    scales = message[torch.zeros(SHAPE).numel() :].view(torch.float32)
    assert (scales == 1.0).all()


def exchange(precision):
    """What the second of two ranks gets of three messages sent at once."""
    group, made = dist.group.WORLD, wire(precision)
    if group.rank() == 0:
        sending = [made.send(outliers() * k, 1, group) for k in (1, 2, 3)]
        for handle in sending:
            handle.wait()
        return made.wire.counter.take()["pipeline"] - 3 * made.nbytes
    arrived = [made.receive(0, group, torch.device("cpu")).wait() for _ in range(3)]
    expected = [made.unpack(made.pack(outliers() * k)) for k in (1, 2, 3)]
    return sum(not torch.equal(a, b) for a, b in zip(arrived, expected, strict=True))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_messages_arrive_in_order(precision, run_distributed):
    assert run_distributed(exchange, 2, precision) == [0, 0]


def wait_for_a_hung_stage():
    group = dist.new_group(timeout=timedelta(seconds=2))
    if group.rank() == 1:
        return None
    with pytest.raises(RuntimeError) as caught:
        wire("fp8").receive(1, group, torch.device("cpu")).wait()
    return str(caught.value)


def test_a_hung_stage_is_named(run_distributed):
    message, _ = run_distributed(wait_for_a_hung_stage, 2)
    assert "stage 1 (rank 1)" in message
