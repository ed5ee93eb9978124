"""Process groups in Megatron's order, from a launcher's environment or without one."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import (
    model_parallel_groups,
    node_groups,
    pipeline_groups,
    process_groups,
    rank_device,
    replicas_per_node,
)
from fp8lm.config import ParallelConfig
from fp8lm.runtime.errors import InputError, RunFailed

CPU = torch.device("cpu")


def parallel(tp, pp=1):
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def members(groups):
    """Ranks of the world in each group, and whether this rank writes."""
    names = ("tensor_parallel", "data_parallel", "pipeline_parallel", "world")
    return [dist.get_process_group_ranks(getattr(groups, n)) for n in names], groups.is_main


def divide(tp, pp):
    dims = ParallelDims.divide(dist.get_world_size(), tp=tp, pp=pp)
    with model_parallel_groups(dims) as groups:
        return members(groups)


@pytest.mark.parametrize(
    ("world_size", "tp", "pp"), [(2, 2, 1), (2, 1, 2), (4, 1, 1), (4, 2, 1), (4, 4, 1), (8, 2, 2)]
)
def test_tensor_then_data_then_pipeline(run_distributed, world_size, tp, pp):
    dp = world_size // (tp * pp)
    grid = torch.arange(world_size).view(pp, dp, tp)
    for rank, (groups, is_main) in enumerate(run_distributed(divide, world_size, tp, pp)):
        stage, replica, shard = (grid == rank).nonzero()[0].tolist()
        assert groups == [
            grid[stage, replica, :].tolist(),
            grid[stage, :, shard].tolist(),
            grid[:, replica, shard].tolist(),
            list(range(world_size)),
        ]
        assert is_main == (rank == 0)


def test_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):  # leaves nothing behind that the next would trip over
        with process_groups(CPU) as groups:
            assert members(groups) == ([[0]] * 4, True)
    assert not dist.is_initialized()


def blocks_on_nodes(tp, dp, pp, node_size, per_node):
    """Nodes of every run of `per_node` replicas that sum together, as sets."""
    for ranks in ParallelDims(tp=tp, dp=dp, pp=pp).rank_lists("dp"):
        for first in range(0, dp, per_node):
            yield {rank // node_size for rank in ranks[first : first + per_node]}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("node_size", [2, 4, 6, 8])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_replicas_that_sum_together_are_on_one_node(tp, node_size, given):
    summed = 0
    for pp, dp in itertools.product((1, 2, 3, 4), range(1, 25)):
        if tp * dp * pp % node_size:
            continue
        try:
            per_node = replicas_per_node(dp, tp, node_size, given=given)
        except InputError:
            assert given
            continue
        if per_node is not None:
            summed += 1
            assert 1 < per_node < dp and dp % per_node == 0
            assert all(
                len(nodes) == 1 for nodes in blocks_on_nodes(tp, dp, pp, node_size, per_node)
            )
    assert bool(summed) == (node_size % tp == 0 and node_size > tp)


def test_replicas_that_a_node_does_not_divide():
    assert replicas_per_node(12, 1, 8, given=False) == 4
    assert replicas_per_node(3, 1, 2, given=False) is None
    assert replicas_per_node(12, 4, 6, given=False) is None
    with pytest.raises(InputError, match="node_size = 8 does not divide 12 data-parallel ranks"):
        replicas_per_node(12, 1, 8, given=True)


def threads_after(repeats):
    for _ in range(repeats):
        divide(2, 1)
        with model_parallel_groups(ParallelDims(dp=2, pp=2)) as groups:
            assert pipeline_groups(groups).embd is not None
        with model_parallel_groups() as groups:
            assert node_groups(groups, 2).node.size() == 2
    return threading.active_count(), len(os.listdir("/proc/self/task"))


def test_groups_leave_nothing_behind(run_distributed):
    few, many = (run_distributed(threads_after, 4, repeats) for repeats in (1, 4))
    # Fewer: threads of groups that earlier users of these processes left may end meanwhile.
    assert all(after <= before for before, after in zip(few, many, strict=True))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_one_process_cannot_be_divided(tp, pp):
    with (
        pytest.raises(InputError, match=f"1 process cannot .*tensor_model_parallel_size={tp}"),
        process_groups(CPU, parallel(tp, pp)),
    ):
        pass
    assert not dist.is_initialized()


def under_a_launcher(port, rejoin):
    """Leave the pool's group, run as torchrun would start this rank, and come back."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with mock.patch.dict(os.environ, environment):
        with pytest.raises(InputError, match="start a multiple of 3"):
            process_groups(CPU, parallel(3)).__enter__()
        with process_groups(rank_device(CPU), parallel(2)) as groups:
            found = members(groups)
    dist.init_process_group(
        "gloo", init_method=f"file://{rejoin}", rank=rank, world_size=world_size
    )
    return found


def test_environment_of_a_launcher(run_distributed, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = run_distributed(under_a_launcher, 2, port, str(tmp_path / "rejoin"))
    assert found == [([[0, 1], [rank], [rank], [0, 1]], rank == 0) for rank in range(2)]


def test_gpus_without_nccl_are_refused_before_any_group_is_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with (
        pytest.raises(InputError, match="this PyTorch has no NCCL"),
        process_groups(torch.device("cuda", 0)),
    ):
        pass


@pytest.fixture
def rank(monkeypatch):
    """`rank(number, port)`: be that one of two processes that meet at `port` of this machine."""

    def be(number, port):
        variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        for name, value in {"MASTER_ADDR": "127.0.0.1", **variables}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    return be


def test_a_port_that_another_program_has(rank):
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank(0, server.getsockname()[1])
        with pytest.raises(InputError, match=r"MASTER_PORT=\d+ cannot be used .* in use: set anot"):
            process_groups(CPU).__enter__()
    assert not dist.is_initialized()


def test_nobody_to_meet(rank):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rank(1, port)
    with pytest.raises(RunFailed, match=f"rank 1 .* did not meet .*, port {port}"):
        process_groups(CPU, timeout=timedelta(seconds=1)).__enter__()
    assert not dist.is_initialized()


def test_a_process_that_does_not_come(rank):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rank(0, port)
    with pytest.raises(RunFailed, match="rank"):
        process_groups(CPU, timeout=timedelta(seconds=1)).__enter__()
    assert not dist.is_initialized()
