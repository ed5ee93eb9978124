"""Experts are divided over other ranks than dense parameters: a step is that of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import build_param_groups, model_parallel_groups
from fp8lm.layers.param import named_params
from fp8lm.parallel.build_data_parallel import max_by_group
from tests.parallel.experts import EXPERTS, TinyExperts, on_one_process, on_ranks
from tests.planner.tiny import tiny

pytestmark = pytest.mark.slow

STEPS, RANKS = 3, 4
# Sums in fp32 of fp32 gradients, in rank order: the bits are those of one process.
EXACT = {"preset": "o3", "main_grads_dtype": "fp32", "wire": {"grads": "fp32"}}
OVERLAP = {"overlap_param_gather": True, "ddp_bucket_size": 1500}
LAYOUTS = {
    "tensor": {},
    "even": {"partition": "even"},
    "even overlap": {"partition": "even"} | OVERLAP,
    "tensor overlap": OVERLAP,
    "plain": {"use_distributed_optimizer": False, "ddp_bucket_size": 1500},
}


def config(parallel, precision, clip_grad=0.01):
    made = tiny(parallel=parallel, precision=precision)
    optimizer = made.optimizer.model_copy(update={"clip_grad": clip_grad})
    return made.model_copy(update={"optimizer": optimizer})


def own(tensor, name, rows):
    """Of a state of the whole parameter the rows of this rank; scales and weights are whole."""
    kind, _, rest = name.partition(".")
    path, _, field = rest.rpartition(".")
    return tensor[slice(*rows[path])] if field == "payload" and kind in "123" else tensor


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_one_process(layout, ep, run_distributed):
    made = config(LAYOUTS[layout], EXACT)
    steps, state, params_norm = on_one_process(made, ep, RANKS, STEPS)
    owned = {}
    for rows, found, local, local_norm in run_distributed(on_ranks, RANKS, made, ep, STEPS):
        for (gradients, amaxes, *scalars), (whole, all_amaxes, *expected) in zip(
            found, steps, strict=True
        ):
            assert scalars == expected and expected[1] < 0.5  # clipped, not skipped
            assert amaxes == {name: all_amaxes[name] for name in amaxes}
            for name, gradient in gradients.items():
                assert torch.equal(gradient, whole[name][slice(*rows[name])]), name
        for name, tensor in local.items():
            assert torch.equal(tensor, own(state[name], name, rows)), name
        assert local_norm == params_norm
        for name, (start, stop) in rows.items():
            owned[name] = owned.get(name, 0) + stop - start
    for name, count in owned.items():
        holders = RANKS // (ep if name.startswith("experts") else 1) if layout == "plain" else 1
        assert count == 32 * holders, name
    assert set(owned) == set(steps[0][0])


# Below the error of a wrong divisor or of a group too many or too few, which is 1/2 and more.
INEXACT = {
    "o3": ({}, {"preset": "o3"}),
    "two hops": ({"node_size": 2}, {"preset": "o3"}),
    "fp8_sum": ({}, {"preset": "o3", "grad_reduce": "fp8_sum"}),
    "fp8_sum plain": (LAYOUTS["plain"], {"preset": "o3", "grad_reduce": "fp8_sum"}),
}


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("case", INEXACT)
def test_gradients_in_fp8_are_near_those_of_one_process(case, ep, run_distributed):
    made = config(*INEXACT[case])
    exact = config({}, EXACT)
    ((whole, _, norm, *_),) = on_one_process(exact, ep, RANKS, 1)[0]
    for rows, ((gradients, _, found, *_),), *_ in run_distributed(on_ranks, RANKS, made, ep, 1):
        assert found == pytest.approx(norm, rel=0.05)
        for name, gradient in gradients.items():
            expected = whole[name][slice(*rows[name])]
            assert (gradient - expected).norm() <= 0.2 * expected.norm(), name


@pytest.mark.parametrize("layout", ["tensor", "plain"])
def test_a_fault_on_one_rank_skips_the_step_on_all(layout, run_distributed):
    made, bad = config(LAYOUTS[layout], EXACT), STEPS - 1
    results = run_distributed(on_ranks, RANKS, made, 2, STEPS, (3, bad))
    without = run_distributed(on_ranks, RANKS, made, 2, bad)
    for (_, steps, state, _), (_, _, before, _) in zip(results, without, strict=True):
        assert [skipped for *_, skipped in steps] == [False] * bad + [True]
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def largest_ranks(dims):
    with model_parallel_groups(dims) as groups:
        weights = named_params(TinyExperts(range(EXPERTS), {"preset": "o3"}))
        wire = Wire("grads", "fp32", WireCounter())
        largest = max_by_group(weights, build_param_groups(groups), wire)
        values = largest(torch.full((len(weights), 2), float(dist.get_rank())))
    by_name = dict(zip(weights, values[:, 1].tolist(), strict=True))
    return by_name["first.weight"], by_name["experts.3.bias"]


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (ParallelDims(dp=4, ep=2), [(3, 2), (3, 3), (3, 2), (3, 3)]),
        (ParallelDims(tp=2, dp=2, ep=2), [(3, 1), (3, 1), (3, 3), (3, 3)]),
        (ParallelDims(ep=2, dp=2, pp=2), [(1, 0), (1, 1), (3, 2), (3, 3)]),
        (ParallelDims(dp=2, pp=2), [(1, 1), (1, 1), (3, 3), (3, 3)]),
    ],
    ids=str,
)
def test_maxima_are_those_of_the_ranks_that_hold_a_parameter(dims, expected, run_distributed):
    assert run_distributed(largest_ranks, RANKS, dims) == expected


def test_context_parallel_ranks_are_in_no_group_yet(run_distributed):
    with pytest.raises(NotImplementedError, match="context"):
        run_distributed(largest_ranks, RANKS, ParallelDims(cp=2, dp=2))
