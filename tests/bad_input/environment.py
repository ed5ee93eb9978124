"""What launchers and machines get wrong."""

from __future__ import annotations

from tests.bad_input.cases import train

RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TP2 = "parallel.tensor_model_parallel_size=2"

CASES = [
    train(says="RANK set but not WORLD_SIZE, LOCAL_RANK", environment={"RANK": "0"}),
    train(says="set but not MASTER_ADDR, MASTER_PORT: start with torchrun", environment=RANK),
    train(says="RANK=zero is not a number", environment=RANK | WHERE | {"RANK": "zero"}),
    train(says="must be below WORLD_SIZE=2", environment=RANK | WHERE | {"RANK": "2"}),
    train(
        says="MASTER_PORT=abc is not a number", environment=RANK | WHERE | {"MASTER_PORT": "abc"}
    ),
    train(
        says="MASTER_PORT=99999 must be from 1 to 65535: start with torchrun",
        environment=RANK | WHERE | {"MASTER_PORT": "99999"},
    ),
    train(
        says="LOCAL_WORLD_SIZE=0 must be at least 1",
        environment=RANK | WHERE | {"LOCAL_WORLD_SIZE": "0"},
    ),
    train(
        says="GROUP_WORLD_SIZE=0 must be at least 1",
        environment=RANK | WHERE | {"GROUP_WORLD_SIZE": "0"},
    ),
    train(
        says=("srun has started 2 processes", "MASTER_ADDR and MASTER_PORT"),
        environment={"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    ),
    train(
        says=("mpirun has started 4", "MASTER_PORT: mpirun -x"),
        environment={"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "a"},
    ),
    train(says="PMI_RANK=one is not a number", environment={"PMI_RANK": "one", "PMI_SIZE": "2"}),
    train(TP2, says="1 process cannot"),
    train("parallel.pipeline_model_parallel_size=4", says="pipeline_model_parallel_size=4"),
    train(
        TP2,
        "parallel.pipeline_model_parallel_size=2",
        says="start a multiple of 4",
        environment=RANK | WHERE,
    ),
    train("train.device=cuda", says="sees no GPU: check the driver"),
]
