"""The command line of `python -m fp8lm.launch`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fp8lm.arguments import number_type, path_text
from fp8lm.config.command_line import config_and_overrides
from fp8lm.config.options import explain_options
from fp8lm.runtime.errors import CommandParser, InputError

PROGRAM = "python -m fp8lm.launch"
USAGE = f"{PROGRAM} [options] CONFIG.yaml [section.key=value ...]"
GRACE = 240
MEETING = ("node_rank", "rdzv_endpoint", "local_addr")  # how one of several machines joins them
DEFAULT_PORT = 29400
MOST_PORT = 65535
# Beyond these a number is a slip, and the layout of so many processes not worth waiting for.
MOST_PROCESSES = 65536
MOST_PER_NODE = 1024
MOST_SIMULATED = 256
_IPV6 = re.compile(r"(?=.*:.*:)[0-9a-fA-F:.]+(%\w+)?", re.ASCII)  # without its brackets
_ENDPOINT = re.compile(r"(\[[\w.:-]+\]|[\w.-]+)(?::([0-9]+))?", re.ASCII)


@dataclass(frozen=True)
class Options:
    """What was asked for.

    `nproc_per_node` None: a process per GPU, or one without GPUs; `shutdown_timeout` None: what the
    environment says, or GRACE seconds.
    """

    config: str
    overrides: tuple[str, ...]
    nnodes: int
    nproc_per_node: int | None
    node_rank: int | None
    rdzv_endpoint: str | None
    rdzv_id: str
    local_addr: str | None
    max_restarts: int
    shutdown_timeout: int | None
    log_dir: str | None
    dry_run: bool
    all_ranks: bool
    gpu: str | None
    simulate: bool


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line; InputError for what makes no sense. `--help` exits with 0."""
    parser = _parser()
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise InputError(explain_options(argv, unknown, parser))
    config, overrides = config_and_overrides(given.config, given.overrides)
    if not config:  # an empty argument is a shell's variable that is not set
        raise InputError(f"no config: {USAGE}, for one of those in configs/")
    if given.all_ranks and not given.dry_run:
        raise InputError("--all-ranks is for --dry-run, which shows the layout: add --dry-run")
    if given.gpu and not given.dry_run:
        raise InputError("--gpu is for --dry-run, which predicts the run on it: add --dry-run")
    nnodes = given.simulate or given.nnodes or 1
    _check_nodes(given, nnodes)
    rendezvous = given.rdzv_endpoint
    return Options(
        config=config,
        overrides=tuple(overrides),
        nnodes=nnodes,
        nproc_per_node=given.nproc_per_node,
        node_rank=given.node_rank,
        rdzv_endpoint=None if rendezvous is None else endpoint(rendezvous),
        rdzv_id=job_name(given.rdzv_id),
        local_addr=given.local_addr,
        max_restarts=(3 if nnodes > 1 else 0) if given.max_restarts is None else given.max_restarts,
        shutdown_timeout=given.shutdown_timeout,
        log_dir=given.log_dir,
        dry_run=given.dry_run,
        all_ranks=given.all_ranks,
        gpu=given.gpu,
        simulate=given.simulate is not None,
    )


def _check_nodes(given: argparse.Namespace, nnodes: int) -> None:
    processes = nnodes * (given.nproc_per_node or 1)
    if processes > MOST_PROCESSES:
        raise InputError(f"{processes} processes are more than {MOST_PROCESSES}, as jobs go")
    if given.simulate is not None:
        _check_simulated(given)
        return
    if given.nnodes is None:
        _check_alone(given)
    if given.node_rank is not None and given.node_rank >= nnodes:
        raise InputError(f"--node-rank={given.node_rank} is not below --nnodes={nnodes}")
    if nnodes > 1 and given.rdzv_endpoint is None and not given.dry_run:
        raise InputError(
            f"--nnodes={nnodes} needs --rdzv-endpoint=HOST:PORT, where all nodes meet: one of them"
        )


def _check_alone(given: argparse.Namespace) -> None:
    # Without a number of machines each would train for itself, all into the same folders.
    for name in MEETING:
        if (value := getattr(given, name)) is not None:
            raise InputError(
                f"--{name.replace('_', '-')}={value} belongs to a run on several machines: say how "
                "many with --nnodes=N (NNODES of train_multinode.sh), 1 for this one alone"
            )


def _check_simulated(given: argparse.Namespace) -> None:
    for name in ("nnodes", *MEETING):
        if getattr(given, name) is not None:
            raise InputError(
                f"--simulate makes nodes of its own on this machine: drop "
                f"--{name.replace('_', '-')}"
            )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=PROGRAM,
        usage=USAGE,
        description="Check a run, then start it with torchrun.",
        epilog="Config keys: python pretrain_gpt.py --help. More: docs/user-guide/launching.md",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    _add_machines(parser.add_argument)
    _add_behaviour(parser.add_argument)
    return parser


def _add_machines(add: Callable[..., Any]) -> None:
    add("--config", metavar="FILE", help="the config; or the first argument without a dash")
    add("--nnodes", type=node_count, metavar="N", help="machines (1)")
    add(
        "--nproc-per-node",
        type=number_type(1, MOST_PER_NODE, "no machine has so many GPUs or cores"),
        metavar="M",
        help="processes on each (one per GPU, or one)",
    )
    add("--node-rank", type=number_type(0), metavar="K", help="number of this one; 0 is the host")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet: at number 0's")
    add("--rdzv-id", default="fp8lm", metavar="ID", help="name of the job, the same on all (fp8lm)")
    add("--local-addr", metavar="ADDR", help="where the others reach this machine (its name)")
    add(
        "--simulate",
        type=number_type(1, MOST_SIMULATED, "each of them takes a process with PyTorch and more"),
        metavar="N",
        help="N machines as N groups of processes on this one",
    )


def _add_behaviour(add: Callable[..., Any]) -> None:
    add(
        "--max-restarts",
        type=number_type(0),
        metavar="R",
        help="restarts after a failure (3 on several machines, else 0)",
    )
    add(
        "--shutdown-timeout",
        type=number_type(0),
        metavar="S",
        help=f"seconds for saving after a warning signal ({GRACE}; torch 2.11 always gives 30)",
    )
    add(
        "--log-dir",
        type=path_text,
        metavar="DIR",
        help="a file per rank; the console shows one rank per machine",
    )
    add("--dry-run", action="store_true", help="check, print command and layout, start nothing")
    add("--all-ranks", action="store_true", help="with --dry-run: a line per rank")
    add(
        "--gpu",
        type=path_text,
        metavar="NAME",
        help="with --dry-run: memory and time on such GPUs: h100, h200, b200 or FILE.yaml",
    )


def node_count(text: str) -> int:
    """N, or N:N as Kubeflow writes it; the batches of a run do not fit any number of machines."""
    least, _, most = text.partition(":")
    if most not in ("", least):
        raise argparse.ArgumentTypeError(f"{text!r} is a range: give one number")
    return number_type(1, MOST_PROCESSES, "no job has so many machines")(least)


def endpoint(text: str) -> str:
    """HOST:PORT of HOST, HOST:PORT or [IPv6]:PORT; InputError if it is none of them."""
    option = f"--rdzv-endpoint={text}"
    match = _ENDPOINT.fullmatch(text)
    if match is None and _IPV6.fullmatch(text):
        raise InputError(f"{option}: an IPv6 address is written in brackets, [::1]:{DEFAULT_PORT}")
    if match is None:
        raise InputError(f"{option}: write it as HOST:PORT")
    host, port = match[1], int(match[2] or DEFAULT_PORT)
    if not 1 <= port <= MOST_PORT:
        raise InputError(f"{option}: a port is a number from 1 to {MOST_PORT}")
    return f"{host}:{port}"


def job_name(text: str) -> str:
    """The name of a job, which is part of a folder's; InputError if it cannot be."""
    if not re.fullmatch(r"[^/\s]+", text):
        raise InputError(f"--rdzv-id={text}: a folder of logs gets that name: no slashes or spaces")
    return text
