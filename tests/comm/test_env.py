"""What a launcher's environment says, and what it must not leave out."""

from __future__ import annotations

import pytest
import torch

from fp8lm.comm.env import DistEnv
from fp8lm.comm.groups import rank_device
from fp8lm.runtime.errors import InputError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}])
def test_one_process_without_a_launcher(environment):
    assert DistEnv.from_environment(environment) == DistEnv(0, 1, 0, 1, by_launcher=False)


def test_torchrun():
    assert DistEnv.from_environment(TORCHRUN) == DistEnv(5, 8, 1, 8, by_launcher=True)
    several = TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}
    assert DistEnv.from_environment(several) == DistEnv(5, 8, 1, 4, by_launcher=True)


def test_restarts_and_machines():
    restarted = TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "3", "GROUP_WORLD_SIZE": "2"}
    launch = DistEnv.from_environment(restarted)
    assert (launch.restart, launch.machines) == (3, 2)
    assert DistEnv.from_environment(TORCHRUN).restart == 0


@pytest.mark.parametrize("missing", TORCHRUN)
def test_incomplete_environment(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(InputError, match=f"set but not {missing}: start with torchrun"):
        DistEnv.from_environment(environment)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"RANK": "first"}, "RANK=first is not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 is not a number"),
        ({"RANK": "8"}, "must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "9"}, "must be below WORLD_SIZE=8"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc is not a number"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be from 1 to 65535"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 must be at least 1"),
        ({"GROUP_WORLD_SIZE": "0"}, "GROUP_WORLD_SIZE=0 must be at least 1"),
        ({"TORCHELASTIC_RESTART_COUNT": "-1"}, "TORCHELASTIC_RESTART_COUNT=-1 is not a number"),
    ],
)
def test_nonsense(change, complaint):
    with pytest.raises(InputError, match=complaint):
        DistEnv.from_environment({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "index"), [("1", 4, 1), ("3", 4, 3), ("3", 1, 0), ("3", 2, 1)]
)
def test_ranks_take_gpus_round_and_round(monkeypatch, local_rank, num_gpus, index):
    for name, value in {**TORCHRUN, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    assert rank_device(torch.device("cuda"), num_gpus) == torch.device("cuda", index)
    assert rank_device(torch.device("cpu"), num_gpus) == torch.device("cpu")
