"""The torchrun command of a node: its arguments and environment variables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp8lm.launch.options import GRACE, Options
from fp8lm.runtime.addresses import INTERFACES, interface_of, is_loopback

# torchrun's own, and SLURM's usual warning of a job's end. It passes them on to the workers.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# PyTorch's name since 2.9, and the one before.
ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
NODE_NAME = "$(uname -n)"  # in a command for all nodes; a shell makes of it what platform.node() is


def torchrun_arguments(
    options: Options,
    nproc_per_node: int,
    rdzv_conf: Mapping[str, int] | None = None,
    name: str | None = None,
) -> list[str]:
    """Arguments for this node; `rdzv_conf`: further settings of the rendezvous.

    `name` (default: this machine's) is the node's, for its folder of logs where it has no number.
    """
    arguments = [f"--nproc-per-node={nproc_per_node}", f"--max-restarts={options.max_restarts}"]
    if options.nnodes == 1:
        # Said although it is the default: torchrun would take PET_NNODES of a Kubeflow pod.
        arguments += ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        arguments += [f"--rdzv-id={options.rdzv_id}"]  # names the folder of logs
    else:
        arguments += _rendezvous(options, rdzv_conf or {})
    arguments.append(f"--signals-to-handle={SIGNALS}")
    if options.log_dir is not None:
        folder = _log_dir(options, Path(options.log_dir), name)
        arguments += [f"--log-dir={folder}", "--redirects=3", "--tee=3"]
        arguments.append("--local-ranks-filter=0")
    return [*arguments, *training_program(), "--config", options.config, *options.overrides]


def _rendezvous(options: Options, conf: Mapping[str, int]) -> list[str]:
    if options.node_rank is not None:
        # Otherwise torchrun compares names and addresses, and an alias defeats it.
        conf = {"is_host": int(options.node_rank == 0), **conf}
    arguments = [f"--nnodes={options.nnodes}", "--rdzv-backend=c10d"]
    arguments += [f"--rdzv-endpoint={options.rdzv_endpoint or 'HOST:PORT'}"]
    arguments += [f"--rdzv-id={options.rdzv_id}"]
    if conf:
        arguments.append("--rdzv-conf=" + ",".join(f"{key}={n}" for key, n in conf.items()))
    if options.local_addr is not None:
        arguments.append(f"--local-addr={options.local_addr}")
    return arguments


def _log_dir(options: Options, folder: Path, name: str | None) -> Path:
    # Below it torchrun makes ID_RANDOM/attempt_K/LOCAL_RANK/, which does not tell nodes apart.
    if options.nnodes == 1:
        return folder
    if options.node_rank is not None:
        return folder / f"node_{options.node_rank}"
    return folder / (name or platform.node())


def torchrun_environment(options: Options) -> dict[str, str]:
    """Variables that the command needs: as they are set already, unless an option says other."""
    wanted = {
        # What torchrun sets too, with a banner.
        "OMP_NUM_THREADS": "1",
        # Workers finish their step and save in this time. An option only from torch 2.12 on.
        TIMEOUT: str(GRACE),
    }
    if OLD_ALLOCATOR not in os.environ:
        # Otherwise what is free lies in pieces: evaluation and training want other sizes.
        wanted[ALLOCATOR] = "expandable_segments:True"
    if options.nnodes > 1:
        # Otherwise (seen in torch 2.13) a node keeps the address of the former first node, and
        # never meets the others again when that node has been replaced.
        wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if interface := _interface(options.local_addr):
            wanted |= dict.fromkeys(INTERFACES, interface)
    if options.log_dir is not None:
        wanted["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
    wanted = {name: os.environ.get(name, value) for name, value in wanted.items()}
    if options.shutdown_timeout is not None:
        wanted[TIMEOUT] = str(options.shutdown_timeout)
    return wanted


def _interface(address: str | None) -> str | None:
    """The network interface of `address`, unless that is this machine's loopback or not here."""
    if address is None or is_loopback(address):
        return None
    return interface_of(address)


def command_line(environment: Mapping[str, str], module: str, arguments: Sequence[str]) -> str:
    """What a shell in this folder takes to run `module` as it would be run here."""
    environment = {**_import_path(), **environment}
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    words = map(_word, [sys.executable, "-m", module, *arguments])
    return " ".join([*variables, *words])


def _import_path() -> dict[str, str]:
    """PYTHONPATH where the package is found only through it: not in this folder, not installed."""
    root, given = Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH", "")
    if Path.cwd() == root or root not in (Path(part).resolve() for part in given.split(os.pathsep)):
        return {}
    return {"PYTHONPATH": str(root)}


def _word(argument: str) -> str:
    if argument.startswith("--log-dir=") and argument.endswith(NODE_NAME):
        return f'{shlex.quote(argument.removesuffix(NODE_NAME))}"{NODE_NAME}"'
    return shlex.quote(argument)


def training_program() -> list[str]:
    """`pretrain_gpt.py` beside the package, relative to the current folder where it is below it.

    The module of the same program where there is no checkout.
    """
    script = Path(__file__).resolve().parents[2] / "pretrain_gpt.py"
    if not script.exists():
        return ["--module", "fp8lm.pretrain"]
    here = Path.cwd()
    return [str(script.relative_to(here) if script.is_relative_to(here) else script)]
