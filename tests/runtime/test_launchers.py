"""What srun and mpirun say of their processes, and what they leave to the user."""

from __future__ import annotations

import pytest

from fp8lm.comm.env import DistEnv
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.launchers import adopt_launcher, find_tasks, first_host

WHERE = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
# As srun -N 2 -n 3 sets them for the last task, beside those of its job of 8 tasks.
SRUN = {
    "SLURM_JOB_ID": "70123",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
BATCH = {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NODEID")}
BATCH |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu07"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **WHERE}


def adopted(environment):
    changed = dict(environment)
    adopt_launcher(changed)
    return DistEnv.from_environment(changed), changed.get("MASTER_ADDR"), changed.get("MASTER_PORT")


@pytest.mark.parametrize(
    ("environment", "launch", "address", "port"),
    [
        (SRUN, DistEnv(2, 3, 0, 1, True, 3), "gpu07", "20124"),
        (SRUN | WHERE, DistEnv(2, 3, 0, 1, True, 3), "node1", "29500"),
        # In a shell of salloc, whose own variables srun passes on.
        (SRUN | {"SLURM_PTY_PORT": "4"}, DistEnv(2, 3, 0, 1, True, 3), "gpu07", "20124"),
        (
            SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
            DistEnv(1, 3, 1, 2, True, 2),
            "gpu07",
            "20124",
        ),
        # Handed on alone, into a container for instance.
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"} | WHERE,
            DistEnv(1, 2, 1, 2, True),
            "node1",
            "29500",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"} | WHERE | {"MASTER_ADDR": "localhost"},
            DistEnv(0, 2, 0, 2, True),
            "localhost",
            "29500",
        ),
        # srun --mpi=pmi2 sets these itself.
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3"}, DistEnv(2, 3, 0, 1, True, 3), "gpu07", "20124"),
        # Hydra's daemons are srun's tasks, one on each machine.
        (
            SRUN
            | WHERE
            | {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            DistEnv(5, 6, 1, 2, True, 3),
            "node1",
            "29500",
        ),
        (OPEN_MPI | WHERE, DistEnv(5, 8, 1, 4, True, 2), "node1", "29500"),
        # mpirun starts its daemons with srun, one on each machine.
        (OPEN_MPI | SRUN | WHERE, DistEnv(5, 8, 1, 4, True, 2), "node1", "29500"),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
            | {"MASTER_PORT": "1"},
            DistEnv(1, 2, 1, 2, True, 1),
            "127.0.0.1",
            "1",
        ),
        (
            {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()} | WHERE,
            DistEnv(5, 8, 1, 4, True, 2),
            "node1",
            "29500",
        ),
    ],
)
def test_ranks_of_other_launchers(environment, launch, address, port):
    assert adopted(environment) == (launch, address, port)


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN,
        TORCHRUN | SRUN,  # srun with a task per machine, each of them torchrun
        TORCHRUN | OPEN_MPI,
        BATCH,  # a batch script
        SRUN | {"SLURM_STEP_ID": "4294967291"},  # the same as a step
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # an interactive shell
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash in a job of 8 tasks
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # a shell of salloc
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMIX_RANK": "0"},
        {},
    ],
)
def test_one_process_or_torchrun(environment):
    changed = dict(environment)
    adopt_launcher(changed)
    assert changed == environment


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun .* MASTER_ADDR and MASTER_PORT: export"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun has started 2 processes"),
        (OPEN_MPI, "mpirun has started 8 .*: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT"),
        (OPEN_MPI | {"MASTER_ADDR": "a"}, "cannot meet without MASTER_PORT: mpirun -x"),
        (OPEN_MPI | {"MASTER_PORT": "1"}, "cannot meet without MASTER_ADDR: mpirun -x"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpiexec -genv MASTER_ADDR HOST"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"} | WHERE, "set RANK, WORLD_SIZE and LOCAL_RANK for"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x is not a number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "-2"}, "OMPI_COMM_WORLD_SIZE=-2 is not a number"),
    ],
)
def test_processes_that_could_not_meet_are_refused(environment, says):
    with pytest.raises(InputError, match=says):
        adopt_launcher(dict(environment))


def test_tasks_of_a_launcher():
    assert find_tasks(SRUN).size == 3
    assert find_tasks(BATCH) is None and find_tasks({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a[03-05,9]-x,b", "a03-x"),
        ("n[1,3]", "n1"),
        ("r1-c[2]n,d", "r1-c2n"),
        ("", None),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first
