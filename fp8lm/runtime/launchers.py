"""Translates the variables of srun and mpirun into those of torchrun.

    launcher                        rank, size                  on this machine
    Open MPI                        OMPI_COMM_WORLD_{RANK,SIZE}, _LOCAL_{RANK,SIZE}
    MVAPICH                         MV2_COMM_WORLD_{RANK,SIZE}, _LOCAL_{RANK,SIZE}
    MPICH, Intel MPI (Hydra)        PMI_{RANK,SIZE}             MPI_LOCAL{RANKID,NRANKS}
    SLURM's srun                    SLURM_PROCID, _STEP_NUM_TASKS   _LOCALID, _STEP_TASKS_PER_NODE

mpirun starts its daemons with srun inside a SLURM job, so its variables count first. But a step's
PMI_{RANK,SIZE} without Hydra's others are srun's own: `--mpi=pmi2` sets them, on many clusters by
default. A batch script and an interactive shell of SLURM have most of srun's variables, too, but
are no tasks of a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from fp8lm.runtime.errors import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
HERE = ("127.0.0.1", "localhost", "::1")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # <slurm.h>: of the batch script, of an interactive shell, ...
_NUMBERS = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_MPI = (
    ("mpirun", *(f"OMPI_COMM_WORLD_{number}" for number in _NUMBERS)),
    ("mpirun", *(f"MV2_COMM_WORLD_{number}" for number in _NUMBERS)),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_HOW = {
    "srun": 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
    "MASTER_PORT=29500 before srun",
    "mpirun": "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..., HOST being rank 0's machine",
    "mpiexec": "mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500 ..., HOST being rank 0's "
    "machine",
}


@dataclass(frozen=True)
class Tasks:
    """What a launcher says of its processes; None: it does not."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    address: str | None = None
    port: int | None = None


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables in a process that srun or mpirun has started beside others.

    Nothing is changed where torchrun's are set, or for one process. InputError if the processes
    could not meet: each would train for itself, all into the same folders.
    """
    if any(environment.get(name) for name in TORCHRUN):
        return
    tasks = find_tasks(environment)
    if tasks is not None and tasks.size > 1:
        environment.update(_variables(tasks, environment))


def find_tasks(environment: Mapping[str, str]) -> Tasks | None:
    """The launcher that has started this process, None if there is none that is known."""
    for name, rank, size, local_rank, local_size in _MPI:
        if environment.get(rank) and environment.get(size):
            if not environment.get(local_rank) and _is_task_of_step(environment):
                continue
            return Tasks(
                name,
                _number(rank, environment),
                _number(size, environment),
                _optional(local_rank, environment),
                _optional(local_size, environment),
            )
    return _step(environment) if _is_task_of_step(environment) else None


def _variables(tasks: Tasks, environment: Mapping[str, str]) -> dict[str, str]:
    alone = tasks.local_size == tasks.size
    address = environment.get("MASTER_ADDR") or (HERE[0] if alone else tasks.address)
    port = environment.get("MASTER_PORT") or tasks.port
    missing = [n for n, v in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if v is None]
    if missing:
        raise InputError(
            f"{tasks.launcher} has started {tasks.size} processes, which cannot meet without "
            f"{' and '.join(missing)}: {_HOW[tasks.launcher]}, or start torchrun on each machine"
        )
    here = tasks.rank if address in HERE else None
    local_rank = here if tasks.local_rank is None else tasks.local_rank
    if local_rank is None:
        raise InputError(
            f"{tasks.launcher} does not say which of a machine's processes this is: set RANK, "
            "WORLD_SIZE and LOCAL_RANK for each, or start torchrun on each machine"
        )
    found: dict[str, str | int | None] = {
        "RANK": tasks.rank,
        "WORLD_SIZE": tasks.size,
        "LOCAL_RANK": local_rank,
    }
    if tasks.local_size:
        found["LOCAL_WORLD_SIZE"] = tasks.local_size
        found["GROUP_WORLD_SIZE"] = -(-tasks.size // tasks.local_size)
    found |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def _is_task_of_step(environment: Mapping[str, str]) -> bool:
    if not environment.get("SLURM_PROCID"):
        return False
    step = environment.get("SLURM_STEP_ID", "")
    if step.isdecimal():
        return int(step) < _FIRST_SPECIAL_STEP
    # Without a job's number these are handed on, into a container for instance.
    return "SLURM_JOB_ID" not in environment or environment["SLURM_PROCID"] != "0"


def _step(environment: Mapping[str, str]) -> Tasks | None:
    sizes = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    size = next((name for name in sizes if environment.get(name)), None)
    if size is None:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job, step = (_optional(name, environment) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Tasks(
        "srun",
        _number("SLURM_PROCID", environment),
        _number(size, environment),
        _optional("SLURM_LOCALID", environment),
        _tasks_here(environment),
        first_host(nodes or ""),
        None if job is None else 20000 + (job + (step or 0)) % 10000,
    )


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Of `4(x2),3` tasks per node those of this node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    node = environment.get("SLURM_NODEID", "")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    if not node.isdecimal():
        return None
    return counts[int(node)] if int(node) < len(counts) else None


def first_host(nodes: str) -> str | None:
    """The first of SLURM's list of machines: of `a[03-05,9]-x,b` it is a03-x."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?(?:,|$)", nodes)
    return "".join(part or "" for part in match.groups()) if match else None


def _optional(name: str, environment: Mapping[str, str]) -> int | None:
    return _number(name, environment) if environment.get(name) else None


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not environment[name].isdecimal():
        raise InputError(f"{name}={environment[name]} is not a number: start with torchrun")
    return int(environment[name])
