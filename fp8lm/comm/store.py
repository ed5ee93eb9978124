"""The key-value store through which the processes of a job meet."""

from __future__ import annotations

import os
import platform
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fp8lm.comm.env import DistEnv
from fp8lm.runtime.addresses import port_problem, wait_for_name
from fp8lm.runtime.errors import InputError, RunFailed


def job_store(launch: DistEnv, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 or torchrun holds.

    InputError where that place cannot be used, RunFailed if nobody is there within `timeout`.
    """
    # Without a launcher nobody connects, and no free port is needed.
    if not launch.by_launcher:
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    os.environ["MASTER_ADDR"] = host = host.strip("[]")  # of an IPv6 address
    wait_for_name(host, f"MASTER_ADDR={host}")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank == 0 and not by_agent and (reason := port_problem(port)):
        raise InputError(
            f"MASTER_PORT={port} cannot be used on {platform.node()}, where rank 0 is: {reason}: "
            "set another one for all processes"
        )
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    except dist.DistError as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFailed(
            f"rank {launch.rank} on {platform.node()} did not meet the others at {host}, port "
            f"{port}: rank 0 is not there, or the way is blocked ({cause})"
        ) from error
    # torchrun (seen with 2.13) keeps one store for all restarts, unless the environment variable
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1: addresses of processes that are gone lie in it. Of
    # several machines each counts its own restarts, so the count could not be a name for all.
    restart = launch.restart if launch.machines == 1 else 0
    return dist.PrefixStore(f"restart_{restart}", store)
