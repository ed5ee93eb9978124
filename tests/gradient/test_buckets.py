"""Gradients of replicas at their owners: means, tied and unused weights, order of sending."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.dims import DENSE
from fp8lm.gradient.buckets import GradientBuckets, ShardedReduction
from fp8lm.gradient.reduction import Fp32ReduceScatter
from fp8lm.layers.embedding import embed
from fp8lm.layers.linear import GemmPath, linear
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam, vector_spec
from fp8lm.layers.recipe import FP8_GEMM
from fp8lm.numerics import BF16, E2M5, E4M3, FP32
from fp8lm.parallel.distributed_optimizer import tensors_of
from fp8lm.parallel.param_layout import assign_whole_tensors, shard_rows
from tests.parallel.ranks import CPU, KERNELS, random


class RecordingReduction(Fp32ReduceScatter):
    """Remembers what had happened when each bucket was sent."""

    def start(self, gradients, rows):
        self.events.append("sent")
        return super().start(gradients, rows).then(self._arrive)

    def _arrive(self, means):
        self.events.append("arrived")
        return means


PATH = GemmPath(FP8_GEMM, KERNELS)


def weights():
    def init(tensor, generator):
        return tensor

    table = ParamSpec((64, 32), init, BF16, FP32, keep_high_precision=True)
    return {
        "table": QuantizedParam(table, KERNELS, CPU),
        "first": QuantizedParam(ParamSpec((32, 32), init, E4M3, E4M3), KERNELS, CPU),
        "unused": QuantizedParam(ParamSpec((48, 32), init, E4M3, E4M3), KERNELS, CPU),
        "second": QuantizedParam(ParamSpec((32, 32), init, E4M3, E2M5), KERNELS, CPU),
        "bias": VectorParam(vector_spec(32, 0.5, BF16), KERNELS, CPU),
    }


def backward(made, seed, events):
    """Table, two layers, the table again as a head; random gradients of this rank's own."""
    for index, weight in enumerate(made.values()):
        weight.model_param.payload.copy_(
            random(*weight.spec.shape, seed=index).mul(8).to(weight.model_param.payload.dtype)
        )
    ids = torch.arange(16) * 3
    h = embed(ids, made["table"])
    h = linear(h, made["first"], PATH)
    h.register_hook(lambda dy: events.append("first"))
    h = linear(h, made["second"], PATH, made["bias"].param)
    h.register_hook(lambda dy: events.append("second"))
    y = linear(h, made["table"], PATH)
    y.backward(random(*y.shape, seed=100 + seed, dtype=y.dtype))


def reduce_everywhere():
    made, group = weights(), dist.group.WORLD
    rows = assign_whole_tensors([tensors_of(made)], group.size())[0].rows
    reduction = Fp32ReduceScatter(group, Wire("grads", "fp8", WireCounter(("grads",))), KERNELS)
    reductions = {DENSE: ShardedReduction(reduction, rows)}
    buckets = GradientBuckets(made, reductions, 1500, overlap=False)
    for weight in made.values():
        weight.main_grad.zero()
    backward(made, group.rank(), [])
    means = buckets.finish_everywhere()
    own = {name: KERNELS.dequantize(weight.main_grad.value) for name, weight in made.items()}
    return own, {name: KERNELS.dequantize(mean) for name, mean in means.items()}


# One rounding of the mean to what it travels in: BF16 of tables and biases, E4M3, E2M5 in blocks.
ROUNDED = {"table": 2.0**-8, "bias": 2.0**-8, "first": 2.0**-4, "second": 2.0**-6}


def test_every_rank_gets_the_same_means(run_distributed):
    results = run_distributed(reduce_everywhere, 2)
    for name, bound in ROUNDED.items():
        mean = sum(own[name] for own, _ in results) / 2
        found = [means[name] for _, means in results]
        assert torch.equal(*found)
        assert (found[0] - mean).norm() <= bound * mean.norm(), name


def reduce(place, wire, overlap, bucket_size, microbatches=2):
    group, events = dist.group.WORLD, []
    made = weights()
    rows = place([tensors_of(made)], group.size())[0].rows
    reduction = RecordingReduction(group, Wire("grads", wire, WireCounter(("grads",))), KERNELS)
    reduction.events = events
    reductions = {DENSE: ShardedReduction(reduction, rows)}
    buckets = GradientBuckets(made, reductions, bucket_size, overlap=overlap)
    for weight in made.values():
        weight.main_grad.add(torch.ones(weight.spec.shape))  # of the step before
        weight.main_grad.zero()
    for number in range(microbatches):
        if number == microbatches - 1:
            buckets.enable_grad_sync()
        backward(made, 10 * group.rank() + number, events)
    reduced = buckets.finish()
    own = {name: KERNELS.dequantize(weight.main_grad.value) for name, weight in made.items()}
    return own, {name: (rows[group.rank()][name], g.payload) for name, g in reduced.items()}, events


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("place", [assign_whole_tensors, shard_rows])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bucket_size", [1, 1500, 10**6])
def test_owners_get_the_mean_of_what_every_rank_accumulated(
    size, place, overlap, bucket_size, run_distributed
):
    results = run_distributed(reduce, size, place, "fp32", overlap, bucket_size)
    seen = dict.fromkeys(results[0][0], 0)
    for _, reduced, _ in results:
        for name, (rows, mean) in reduced.items():
            terms = [own[name][slice(*rows)] for own, _, _ in results]
            expected = torch.zeros_like(mean)
            for term in terms:  # in rank order
                expected += term
            assert torch.equal(mean, expected / size), name
            seen[name] += rows[1] - rows[0]
    assert seen == {"table": 64, "first": 32, "unused": 48, "second": 32, "bias": 32}
    assert all(not own["unused"].any() for own, _, _ in results)
    assert all(own["table"].any() for own, _, _ in results)


def test_dense_gradients_travel_in_bf16_on_an_fp8_wire(run_distributed):
    results = run_distributed(reduce, 2, assign_whole_tensors, "fp8", True, 10**6)
    for _, reduced, _ in results:
        for name, (rows, mean) in reduced.items():
            terms = [own[name][slice(*rows)] for own, _, _ in results]
            if name in ("table", "bias"):
                terms = [term.bfloat16().float() for term in terms]
            assert torch.equal(mean, (terms[0] + terms[1]) / 2), name


def test_buckets_leave_while_backward_goes_on(run_distributed):
    for _, _, events in run_distributed(reduce, 2, assign_whole_tensors, "fp8", True, 1):
        last = [event for event in events if event != "arrived"]
        last = last[last.index("first") + 1 :]  # the last micro-batch's
        # The bias and the second layer leave before the first layer's backward; the unused weight
        # holds back all that come after it, the table is used twice.
        assert last == ["second", "sent", "sent", "first", "sent", "sent", "sent"]


def test_nothing_leaves_early_without_overlap(run_distributed):
    for _, _, events in run_distributed(reduce, 2, assign_whole_tensors, "fp8", False, 1):
        backward = ["second", "first"] * 2
        assert events[:4] == backward
        # Two buckets are under way at a time: the messages of the others take no memory yet.
        assert events[4:] == ["sent", "sent"] + ["arrived", "sent"] * 3 + ["arrived"] * 2
