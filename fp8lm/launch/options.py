"""The command line of `python -m fp8lm.launch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fp8lm.errors import CommandParser, InputError

PROGRAM = "python -m fp8lm.launch"
USAGE = f"{PROGRAM} [options] CONFIG.yaml [section.key=value ...]"
DEFAULT_PORT = 29400
GRACE = 240


@dataclass(frozen=True)
class Options:
    """What was asked for; `nproc_per_node` None: a process per GPU, or one without GPUs."""

    config: str
    overrides: tuple[str, ...]
    nnodes: int
    nproc_per_node: int | None
    node_rank: int | None
    rdzv_endpoint: str | None
    rdzv_id: str
    local_addr: str | None
    max_restarts: int
    shutdown_timeout: int
    log_dir: str | None
    dry_run: bool
    all_ranks: bool
    simulate: bool


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line; InputError for what makes no sense. `--help` exits with 0."""
    given, unknown = _parser().parse_known_intermixed_args(list(argv))
    if unknown:
        cure = f"write {unknown[0].lstrip('-')}" if "=" in unknown[0] else f"see {PROGRAM} --help"
        raise InputError(f"unknown option {unknown[0]}: {cure}")
    config, overrides = given.config, list(given.overrides)
    if config is None and overrides and "=" not in overrides[0]:
        config = overrides.pop(0)
    if config is None:
        raise InputError(f"no config: {USAGE}, for one of those in configs/")
    nnodes = given.simulate or given.nnodes or 1
    _check_nodes(given, nnodes)
    return Options(
        config=config,
        overrides=tuple(overrides),
        nnodes=nnodes,
        nproc_per_node=given.nproc_per_node,
        node_rank=given.node_rank,
        rdzv_endpoint=_with_port(given.rdzv_endpoint),
        rdzv_id=given.rdzv_id,
        local_addr=given.local_addr,
        max_restarts=(3 if nnodes > 1 else 0) if given.max_restarts is None else given.max_restarts,
        shutdown_timeout=given.shutdown_timeout,
        log_dir=given.log_dir,
        dry_run=given.dry_run,
        all_ranks=given.all_ranks,
        simulate=given.simulate is not None,
    )


def _check_nodes(given: argparse.Namespace, nnodes: int) -> None:
    if given.simulate is not None:
        if given.rdzv_endpoint or given.node_rank is not None or given.nnodes is not None:
            raise InputError(
                "--simulate makes its own nodes: drop --nnodes, --node-rank and --rdzv-endpoint"
            )
        return
    if given.node_rank is not None and given.node_rank >= nnodes:
        raise InputError(f"--node-rank={given.node_rank} is not below --nnodes={nnodes}")
    if nnodes > 1 and given.rdzv_endpoint is None and not given.dry_run:
        raise InputError(
            f"--nnodes={nnodes} needs --rdzv-endpoint=HOST:PORT, where all nodes meet: one of them"
        )


def _with_port(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    host, colon, port = endpoint.rpartition(":")
    if not colon:
        return f"{endpoint}:{DEFAULT_PORT}"
    if not host or not port.isdecimal():
        raise InputError(f"--rdzv-endpoint={endpoint}: write it as HOST:PORT")
    return endpoint


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=PROGRAM,
        usage=USAGE,
        description="Check a run, then start it with torchrun.",
        epilog="Keys of the config: python pretrain_gpt.py --help. More: docs/launching.md",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    _add_machines(parser.add_argument)
    _add_behaviour(parser.add_argument)
    return parser


def _add_machines(add: Callable[..., Any]) -> None:
    add("--config", metavar="FILE", help="the config; or the first argument without a dash")
    add("--nnodes", type=_nodes, metavar="N", help="machines (1)")
    add(
        "--nproc-per-node",
        type=_at_least(1),
        metavar="M",
        help="processes on each (one per GPU, or one)",
    )
    add("--node-rank", type=_at_least(0), metavar="K", help="this machine's number; 0 is the host")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet: at number 0's")
    add("--rdzv-id", default="fp8lm", metavar="ID", help="name of the job, the same on all (fp8lm)")
    add("--local-addr", metavar="ADDR", help="where the others reach this machine (its name)")
    add(
        "--simulate",
        type=_at_least(1),
        metavar="N",
        help="N machines as N groups of processes on this one",
    )


def _add_behaviour(add: Callable[..., Any]) -> None:
    add(
        "--max-restarts",
        type=_at_least(0),
        metavar="R",
        help="restarts after a failure (3 on several machines, else 0)",
    )
    add(
        "--shutdown-timeout",
        type=_at_least(0),
        default=GRACE,
        metavar="S",
        help=f"seconds for saving after a warning signal ({GRACE}; torch 2.11 always gives 30)",
    )
    add("--log-dir", metavar="DIR", help="a file per rank; the console shows one rank per machine")
    add("--dry-run", action="store_true", help="check, print command and layout, start nothing")
    add("--all-ranks", action="store_true", help="a line per rank in the layout")


def _nodes(text: str) -> int:
    """N, or N:N as Kubeflow writes it; the batches of a run do not fit any number of machines."""
    least, _, most = text.partition(":")
    if most not in ("", least):
        raise argparse.ArgumentTypeError(f"{text!r} is a range: give one number")
    return _at_least(1)(least)


def _at_least(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {smallest}")
        return int(text)

    return number
