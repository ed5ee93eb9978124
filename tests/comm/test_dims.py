"""Megatron's order of ranks, written out by hand; sizes that do not divide."""

from __future__ import annotations

import itertools

import pytest

from fp8lm.comm.dims import ParallelDims
from fp8lm.config import ParallelConfig
from fp8lm.runtime.errors import InputError

AXES = ("tp", "cp", "ep", "dp", "expert_dp", "pp")


def test_sixteen_ranks_with_experts():
    """TP 2, PP 2, and on each stage eight ranks with four replicas, or two of two expert ranks."""
    dims = ParallelDims.divide(16, tp=2, ep=2, pp=2)
    assert [dims.size(axis) for axis in AXES] == [2, 1, 2, 4, 2, 2]
    stage = {
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "dp": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "ep": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "expert_dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }
    for axis, lists in stage.items():
        second = [[rank + 8 for rank in ranks] for ranks in lists]
        assert dims.rank_lists(axis) == lists + second
    assert dims.rank_lists("pp") == [[rank, rank + 8] for rank in range(8)]
    assert dims.rank_lists("tp", "expert_dp")[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert dims.rank_lists("tp", "cp", "dp") == [list(range(8)), list(range(8, 16))]


def test_one_process_by_default():
    assert [ParallelDims().size(axis) for axis in AXES] == [1] * len(AXES)


def test_context_parallel_ranks_are_within_a_replica():
    dims = ParallelDims.divide(8, tp=2, cp=2, ep=4)
    assert (dims.dp, dims.expert_dp) == (2, 1)
    assert dims.rank_lists("cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert dims.rank_lists("ep") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def every_size(limit=3):
    for tp, cp, dp, pp in itertools.product(range(1, limit + 1), repeat=4):
        for ep in range(1, cp * dp + 1):
            if cp * dp % ep == 0:
                yield ParallelDims(tp=tp, cp=cp, ep=ep, dp=dp, pp=pp)


def test_coordinates_are_those_of_a_rank_in_both_views():
    for dims in every_size():
        for view in (("tp", "cp", "dp", "pp"), ("tp", "ep", "expert_dp", "pp")):
            places = [
                {axis: dims.coordinate(rank, axis) for axis in view}
                for rank in range(dims.world_size)
            ]
            assert [dims.rank(**place) for place in places] == list(range(dims.world_size))
            for axis in view:
                for ranks in dims.rank_lists(axis):
                    assert [places[rank][axis] for rank in ranks] == list(range(dims.size(axis)))
                    others = [{**places[rank], axis: 0} for rank in ranks]
                    assert others == others[:1] * len(others)


def test_axes_of_both_views_make_no_group():
    with pytest.raises(ValueError, match="dp, ep"):
        ParallelDims().rank_lists("dp", "ep")


def test_from_config():
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    dims = ParallelDims.from_config(parallel, 12)
    assert dims == ParallelDims(tp=2, dp=2, pp=3) and dims.world_size == 12


@pytest.mark.parametrize(
    ("world_size", "sizes", "named"),
    [
        (6, {"tp": 4}, "tensor_model_parallel_size=4"),
        (6, {"tp": 2, "pp": 2}, "pipeline_model_parallel_size=2"),
        (6, {"cp": 4}, "context_parallel_size=4"),
        (6, {"tp": 0}, "tensor_model_parallel_size=0"),
        (6, {"ep": 4}, "expert_model_parallel_size=4"),
        (8, {"tp": 2, "pp": 2, "ep": 4}, "expert_model_parallel_size=4"),
        (8, {"ep": 0}, "expert_model_parallel_size=0"),
    ],
)
def test_sizes_that_do_not_divide(world_size, sizes, named):
    with pytest.raises(InputError, match=named):
        ParallelDims.divide(world_size, **sizes)
