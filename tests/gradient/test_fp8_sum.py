"""The paper's automatic scaling: arithmetic of the ring, mu's rule, and why mu is needed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Handle, Wire, WireCounter, all_gather_bytes, sums_fp8
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.gradient.fp8_sum import GROWTH, AutoScaler, Fp8Sum, ring_sum
from fp8lm.numerics import BF16, E4M3
from fp8lm.scaled_tensor import ScaledTensor
from tests.parallel.ranks import CPU, KERNELS, random

NO, YES = torch.tensor(False), torch.tensor(True)
SHAPE = (32, 48)


def gradient(rank, amplitude=1.0):
    """Every rank's share of something common, on a scale of its own."""
    common = random(*SHAPE, seed=7) * random(*SHAPE, seed=8).exp()
    own = random(*SHAPE, seed=100 + rank)
    return amplitude * (common + own) * 2.0 ** (rank % 3)


def reducer(group, policy, world=None, native=None):
    scaling = AutoScaler(["w"], group.size(), policy, CPU)
    wire = Wire("grads", "fp8", WireCounter(("grads",)))
    return Fp8Sum(group, world or group, wire, KERNELS, scaling, native)


def like_nccl(codes, fmt, group, wire):
    """A collective of the backend that sums in FP8, in the ring's order; gloo has none."""
    gathered = all_gather_bytes(torch.cat(codes), group, Wire("grads", "fp8", WireCounter())).wait()
    sizes = [part.numel() for part in codes]
    terms = [
        ScaledTensor(rank_codes.split(sizes)[group.rank()], torch.ones(()), fmt)
        for rank_codes in gathered
    ]
    return Handle.done(ring_sum(terms, group.rank(), KERNELS).payload)


def rows_of(size):
    """Rank 1 owns half, the others share the rest."""
    own = [{"w": (16, 32)} if rank == 1 else {} for rank in range(size)]
    step = 16 // (size - 1)
    for i, rank in enumerate(r for r in range(size) if r != 1):
        own[rank] = {"w": (i * step, 16 if i == size - 2 else (i + 1) * step)}
    return own


def reduce(policy, amplitude, poison=None, native=None):
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    reduction = reducer(group, policy, native=native)
    value = gradient(rank, amplitude)
    if poison == rank:
        value[3, 3] = float("inf")
    sent = KERNELS.quantize(value, E4M3)
    dense = KERNELS.quantize(random(8, seed=rank), BF16)
    rows = [own | ({"b": (0, 8)} if r == 0 else {}) for r, own in enumerate(rows_of(size))]
    means = reduction.start({"w": sent, "b": dense}, rows).wait()
    share = reduction.scaling.saturated.clone()
    reduction.finish_step(NO)
    bytes_sent = reduction.wire.counter.take()["grads"]
    return means, share, reduction.scaling.mu.item(), bytes_sent


def emulate(size, mu, amplitude):
    """The ring on one process: the mean of every row, and its saturated share."""
    stored = [KERNELS.quantize(gradient(rank, amplitude), E4M3) for rank in range(size)]
    scale = torch.stack([tensor.scale for tensor in stored]).min() * mu
    terms = [
        ScaledTensor(KERNELS.cast(KERNELS.dequantize(t), scale, E4M3), scale, E4M3) for t in stored
    ]
    means = []
    for owner, own in enumerate(rows_of(size)):
        total = ring_sum([term.rows(*own["w"]) for term in terms], owner, KERNELS)
        means.append((KERNELS.dequantize(total) / size, KERNELS.saturated_share(total)))
    return means


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("policy", ["automatic", "pre_scaling", "post_scaling"])
def test_ring_of_processes_is_the_ring_of_one(size, policy, run_distributed):
    results = run_distributed(reduce, size, policy, 1.0)
    mu = 1.0 / size if policy == "pre_scaling" else 1.0
    for (means, share, _, _), (expected, saturated) in zip(
        results, emulate(size, mu, 1.0), strict=True
    ):
        assert torch.equal(means["w"], expected)
        assert share == saturated
    dense = torch.stack([random(8, seed=r).bfloat16().float() for r in range(size)])
    torch.testing.assert_close(results[0][0]["b"], dense.mean(0))
    # Nobody sends what it owns itself; rank 1 owns half. Scales and the count of saturated values.
    payload = [SHAPE[1] * sum(e - s for s, e in (own["w"],)) for own in rows_of(size)]
    for rank, (_, _, _, sent) in enumerate(results):
        others = sum(payload) - payload[rank]
        assert others <= sent <= others + 16 * size + 24 + 16 * 8


@pytest.mark.parametrize("poison", [None, 1])
def test_the_sum_of_a_backend_takes_the_place_of_the_ring(poison, run_distributed):
    ring = run_distributed(reduce, 4, "automatic", 1.0, poison)
    native = run_distributed(reduce, 4, "automatic", 1.0, poison, like_nccl)
    for (means, share, mu, _), (expected, ring_share, ring_mu, _) in zip(native, ring, strict=True):
        assert torch.equal(means["w"].nan_to_num(7.0), expected["w"].nan_to_num(7.0))
        assert means.keys() == expected.keys()
        # Codes of NaN count for nothing: such a step is skipped, and mu stays as it is.
        assert poison is not None or (share == ring_share and mu == ring_mu)


def test_gloo_adds_up_no_fp8(run_distributed):
    assert run_distributed(asked, 2) == [False, False]


def asked():
    return sums_fp8(dist.group.WORLD, CPU)


def test_saturation_on_one_rank_halves_mu_on_all(run_distributed):
    results = run_distributed(reduce, 4, "automatic", 1.0)
    shares = torch.stack([share for _, share, _, _ in results])
    assert shares.max() > 1e-5
    assert [mu for _, _, mu, _ in results] == [0.5] * 4


@pytest.mark.parametrize("policy", ["pre_scaling", "post_scaling"])
def test_fixed_factors_stay(policy, run_distributed):
    for _, _, mu, _ in run_distributed(reduce, 4, policy, 1.0):
        assert mu == {"pre_scaling": 0.25, "post_scaling": 1.0}[policy]


def remembered(policy):
    return list(reducer(dist.group.WORLD, policy).named_tensors())


def test_only_a_mu_that_moves_is_remembered(run_distributed):
    """A fixed one that came from a checkpoint would be that of another policy, or size."""
    assert run_distributed(remembered, 2, "automatic")[0] == ["w"]
    for policy in ("pre_scaling", "post_scaling"):
        assert run_distributed(remembered, 2, policy)[0] == []


def test_zero_gradients(run_distributed):
    for means, share, mu, _ in run_distributed(reduce, 2, "automatic", 0.0):
        assert not means["w"].any()
        assert (share, mu) == (0.0, pytest.approx(GROWTH))


def silent_but_for(rank, policy):
    """The mean where rank `rank` has small gradients, far below 1, and the others none."""
    group = dist.group.WORLD
    value = torch.full(SHAPE, 1e-4) if group.rank() == rank else torch.zeros(SHAPE)
    if group.rank() == 0:
        value.mul_(-1.0)  # zeros may have a sign
    sent = KERNELS.quantize(value, E4M3)
    return reducer(group, policy).start({"w": sent}, rows_of(group.size())).wait()["w"]


@pytest.mark.parametrize("policy", ["automatic", "pre_scaling", "post_scaling"])
def test_a_rank_without_a_gradient_does_not_flush_the_others(policy, run_distributed):
    # The scale of nothing but zeros is 1, the smallest of all: 1e-4 would be below subnormals.
    for mean in run_distributed(silent_but_for, 4, 2, policy):
        torch.testing.assert_close(mean, torch.full_like(mean, 1e-4 / 4), rtol=2.0**-4, atol=0)


def test_a_fault_on_one_rank_reaches_every_owner(run_distributed):
    for means, *_ in run_distributed(reduce, 4, "automatic", 1.0, 2):
        assert means["w"].isnan().all()


def moved(saturated, mu=1.0, steps=1, ranks=8, skipped=NO, policy="automatic"):
    scaling = AutoScaler(["w"], ranks, policy, CPU)
    scaling.mu.fill_(mu)
    for _ in range(steps):
        scaling.saturated.fill_(saturated)
        scaling.update(skipped)
    return scaling.mu.item()


def test_rule_of_mu():
    assert moved(2e-5) == 0.5
    assert moved(0.9e-5) == pytest.approx(GROWTH)
    assert moved(0.0, 0.5, steps=1000) == pytest.approx(1.0, rel=1e-4)  # doubles in 1,000 steps
    assert moved(0.0, steps=5000) == 2.0
    assert moved(1.0, steps=50) == 0.125  # at 1/8 a sum of eight cannot saturate
    assert moved(1.0, steps=50, ranks=5) == 0.125
    assert moved(1.0, skipped=YES) == 1.0
    assert moved(1.0, policy="post_scaling") == 1.0


def test_mu_is_applied_as_a_power_of_two():
    scaling = AutoScaler(["a", "b", "c"], 8, "automatic", CPU)
    scaling.mu.copy_(torch.tensor([1.9, 1.0, 0.26]))
    assert scaling.factors(["c", "a", "b"]).tolist() == [0.25, 1.0, 1.0]


def test_mu_of_a_larger_run_is_not_below_what_this_one_needs():
    scaling = AutoScaler(["w"], 4, "automatic", CPU)
    scaling.mu.fill_(2.0**-6)  # from a checkpoint of 64 ranks
    assert scaling.factors(["w"]) == 0.25


def snr(found, true):
    return (10 * torch.log10(true.square().sum() / (found - true).square().sum())).item()


def test_mu_finds_the_middle():
    # Four ranks agree on a few large elements: with mu = 1 their sum saturates. All others are
    # small: at 1/N most of them vanish below E4M3's subnormals.
    size = 32
    true = [2.0**-13 * random(*SHAPE, seed=rank) for rank in range(size)]
    for rank, value in enumerate(true):
        value[0, :8] = 1.0 if rank < 4 else 0.0
        value[0, 8] = 1.0  # so that all have one scale, 256
        value[0, 8] *= (-1) ** rank
    stored = [KERNELS.quantize(value, E4M3) for value in true]
    mean = torch.stack(true).mean(0)
    scaling = AutoScaler(["w"], size, "automatic", CPU)

    def reduced(mu):
        """(mean, share of the small terms that vanish); counts what saturates."""
        scale = stored[0].scale * mu
        terms = [
            ScaledTensor(KERNELS.cast(KERNELS.dequantize(s), scale, E4M3), scale, E4M3)
            for s in stored
        ]
        total = ring_sum(terms, 0, KERNELS)
        scaling.saturated.fill_(KERNELS.saturated_share(total))
        vanished = torch.stack([(term.payload[1:] & 0x7F == 0).float().mean() for term in terms])
        return KERNELS.dequantize(total) / size, vanished.mean()

    (pre, underflow), (post, kept) = reduced(1.0 / size), reduced(1.0)
    assert underflow > 0.5 > 10 * kept
    assert mean[0, 0] == 0.125
    assert (post[0, :8] == 448 / 256 / size).all()  # overflow
    for _ in range(20):
        found, _ = reduced(scaling.factors(["w"]).item())
        if scaling.saturated <= 1e-5:
            break
        scaling.update(NO)
    assert scaling.mu == 0.25
    assert (found[0, :8] == 0.125).all()
    assert snr(found[1:], mean[1:]) > snr(pre[1:], mean[1:]) + 3


def wrong_group():
    """Scales of two replicas of two ranks each; with the world's the other pair's would count."""
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        rank = groups.world.rank()
        reduction = reducer(groups.data_parallel, "post_scaling", groups.world)
        # Ranks 0 and 2 are replicas, as are 1 and 3, whose gradients are far larger.
        value = torch.full(SHAPE, 2.0**-8 if rank % 2 == 0 else 2.0**8)
        rows = [{"w": (0, 16)}, {"w": (16, 32)}]
        return reduction.start({"w": KERNELS.quantize(value, E4M3)}, rows).wait()["w"]


def test_scales_are_shared_among_replicas_only(run_distributed):
    for rank, mean in enumerate(run_distributed(wrong_group, 4)):
        # Twice 256 saturates at 448 of E4M3 in codes; half of it is the mean.
        expected = 2.0**-8 if rank % 2 == 0 else 2.0**8
        assert torch.equal(mean, torch.full_like(mean, expected * 448 / 512))


def mu_of_shards():
    """Of two shards of a tensor, on two replicas each, only the sum of the second saturates."""
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        replica, shard = divmod(groups.world.rank(), 2)
        reduction = reducer(groups.data_parallel, "automatic", groups.world)
        value = torch.full(SHAPE, 1.0 if shard else (-1.0) ** replica)
        rows = [{"w": (0, 16)}, {"w": (16, 32)}]
        reduction.start({"w": KERNELS.quantize(value, E4M3)}, rows).wait()
        share = reduction.scaling.saturated.item()
        reduction.finish_step(NO)
        return share, reduction.scaling.mu.item()


def test_shards_of_a_tensor_have_one_mu(run_distributed):
    shares, mus = zip(*run_distributed(mu_of_shards, 4), strict=True)
    assert shares == (0.0, 1.0, 0.0, 1.0)
    assert mus == (0.5,) * 4
