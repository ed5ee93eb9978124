"""The launcher's own options, and what it finds before it starts a process."""

from __future__ import annotations

from tests.bad_input.cases import TINY, run

TWO = ["--nnodes=2", "--rdzv-endpoint=host:1"]


def launch(*arguments, says, **more):
    """`python -m fp8lm.launch` on the tiny config."""
    return run("launch", *TINY, *arguments, says=says, **more)


def meets(endpoint, says):
    return launch("--nnodes=2", f"--rdzv-endpoint={endpoint}", says=says)


def a_file(folder):
    (folder / "a").write_text("")


NO_CONFIG = [
    run("launch", says="no config: python -m fp8lm.launch"),
    run("launch", "", says="no config: python -m fp8lm.launch"),
    run("launch", "--config", "", "train.seed=3", says="no config"),
    run("launch", "a.b=1", says="no config"),
    run("launch", "nowhere.yaml", says="nowhere.yaml does not exist"),
]

OPTIONS = [
    launch("--train.seed=3", says="unknown option --train.seed=3: write train.seed=3"),
    launch("--nproc_per_node", "2", says="--nproc_per_node: did you mean --nproc-per-node?"),
    launch("--dryrun", says="unknown option --dryrun: did you mean --dry-run?"),
    launch("--micro-batch-size", "2", says="write train.micro_batch_size=2"),
    launch("--nodes", "3", says="unknown option --nodes"),
    launch("--nnodes", says=("--nnodes", "--help")),
    launch("--nnodes=0", says="'0' is not a number of at least 1"),
    launch("--nnodes=2:4", says="'2:4' is a range: give one number"),
    launch("--nnodes=99999999999", says="so many machines"),
    launch("--nproc-per-node=auto", says="--nproc-per-node: 'auto' is not a number of at least 1"),
    launch("--nproc-per-node=99999999999", says="1024"),
    launch(
        *TWO, "--nnodes=9999", "--nproc-per-node=99", says="989901 processes are more than 65536"
    ),
    launch("--max-restarts=-1", says="--max-restarts: '-1' is not a number of at least 0"),
    launch("--rdzv-id=a/b", says=("--rdzv-id=a/b", "slashes")),
    launch("--all-ranks", says="--all-ranks is for --dry-run, which shows the layout: add --dry"),
    launch("--rdzv-id=", says="--rdzv-id=: "),
]

MEETINGS = [
    launch("--nnodes=2", says="--nnodes=2 needs --rdzv-endpoint=HOST:PORT"),
    launch(*TWO, "--node-rank=2", says="--node-rank=2 is not below --nnodes=2"),
    meets("host:x", says="--rdzv-endpoint=host:x: write it as HOST:PORT"),
    meets("host:", says="write it as HOST:PORT"),
    meets(":29400", says="--rdzv-endpoint=:29400: write it as HOST:PORT"),
    meets("", says="write it as HOST:PORT"),
    meets("host:0", says=("--rdzv-endpoint=host:0: ", "65535")),
    meets("host:65536", says="1 to 65535"),
    meets("node0..cluster", says=("node0..cluster", "name")),
    meets("n" * 64, says="name of a machine"),
    meets("http://a:1", says="--rdzv-endpoint=http://a:1: write it as HOST:PORT"),
    meets("host:1:2", says="write it as HOST:PORT"),
    meets("::1", says="brackets"),
    meets("fe80::1:29400", says=("brackets", "[::1]:29400")),
]

NO_TP = [
    launch("--rdzv-endpoint=host:1", says=("--rdzv-endpoint=host:1", "several")),
    launch("--local-addr=me", says=("--local-addr=me", "several machines")),
    launch("--node-rank=0", says=("--node-rank=0", "several machines")),
    launch("--dry-run", "--node-rank=3", says="say how many with --nnodes=N (NNODES of train_mu"),
]

SIMULATIONS = [
    launch("--simulate=2", "--nnodes=3", says="drop --nno"),
    launch("--simulate=2", "--node-rank=0", says="drop --node-rank"),
    launch("--simulate=2", "--rdzv-endpoint=a", says="drop --rdzv-endpoint"),
    launch("--simulate=2", "--local-addr=a", says="drop --local-addr"),
    launch("--simulate=2", "train.device=cuda", says="CPU: drop train.device=cuda"),
    launch("--simulate=2", "--dry-run", "train.device=cuda", says="--simulate runs on this mach"),
    launch("--simulate=999", says="'999' is more than 256"),
]

FOLDERS = [
    launch("--log-dir=a", says="--log-dir=a cannot be written to: ", prepare=a_file),
    launch("--log-dir=a/b", says="a is no folder", prepare=a_file),
    launch("checkpoint.save=a", says="checkpoints in a: ", prepare=a_file),
    launch("checkpoint.save=a/b", says="a is no folder", prepare=a_file),
    launch("logging.dir=a", says="logging.dir=a cannot be written to: ", prepare=a_file),
    launch("logging.dir=a/b", says="a is no folder", prepare=a_file),
]

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}

STARTED_BY_OTHERS = [
    launch(
        says=("srun", "8 times", "once on each"),
        environment=SRUN | {"SLURM_STEP_NUM_TASKS": "8"},
    ),
    launch(
        *TWO,
        says="mpirun has started this 16 times for 2 machines: ",
        environment={"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16"},
    ),
]

CASES = [*NO_CONFIG, *OPTIONS, *MEETINGS, *NO_TP, *SIMULATIONS, *FOLDERS, *STARTED_BY_OTHERS]
