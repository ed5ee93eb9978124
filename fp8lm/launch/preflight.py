"""Checks before any process is started.

A worker finds the same mistakes, but after torchrun has started and connected all of them, and
torchrun would start them again. Nothing here imports megatron-core, which takes seconds.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from fp8lm.checkpoint.location import load_problem, pretrained_problem
from fp8lm.checkpoint.save_folder import foreign_checkpoints
from fp8lm.comm.groups import replicas_per_node
from fp8lm.config import Config
from fp8lm.data.datasets import check_files
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.devices import NO_NCCL
from fp8lm.kernels import select_kernels
from fp8lm.kernels.select import check_scaling
from fp8lm.planner.layout import Layout
from fp8lm.planner.plan import Plan, plan_run
from fp8lm.runtime.addresses import (
    NAME_PATIENCE,
    is_loopback,
    leads_to_loopback,
    outward_address,
    port_problem,
    route_address,
    wait_for_name,
)
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.run_lock import running_here
from fp8lm.training.builders import resolve_device
from fp8lm.training.run_folders import run_folders
from fp8lm.training.run_length import accumulation_risks, dataset_sizes

UNEVEN = 1.2


def check_run(config: Config, nnodes: int, nproc_per_node: int) -> Plan:
    """The plan of a run; InputError if sizes, batches, tokenizer or data do not fit."""
    tokenizer = build_tokenizer(config.tokenizer)
    plan = plan_run(config, tokenizer.vocab_size, nnodes * nproc_per_node, nproc_per_node)
    _summed_per_node(plan.layout)
    check_files(config, tokenizer, dataset_sizes(config))
    return plan


def _summed_per_node(layout: Layout) -> int | None:
    """Replicas whose gradients are summed on a machine before these cross; None: they are not.

    InputError if `parallel.node_size` does not fit.
    """
    dims, given = layout.dims, layout.config.parallel.node_size
    if dims.dp == 1 or layout.config.precision.grad_reduce != "fp32_accumulate":
        return None
    size = given or layout.node_size
    return replicas_per_node(dims.dp, dims.stride("dp"), size, given=given is not None)


def check_devices(config: Config, nproc_per_node: int) -> None:
    """InputError unless this machine has a device for each of its processes, with FP8 and NCCL."""
    if resolve_device(config.train.device).type != "cuda":
        return
    found = torch.cuda.device_count()
    if nproc_per_node > found:
        raise InputError(
            f"--nproc-per-node={nproc_per_node}, but this machine has {found} GPUs: start at most "
            f"{found} processes, or use train.device=cpu"
        )
    if not dist.is_nccl_available():
        raise InputError(NO_NCCL)
    for number in range(nproc_per_node):
        device = torch.device("cuda", number)
        select_kernels(device, config.precision.kernels)
        check_scaling(device, config)


def folder_problems(config: Config, log_dir: str | None, is_main: bool) -> list[str]:
    """Folders of the run which here can neither be written to nor made, or are another run's.

    None is made. Reports are written on one machine, the main one.
    """
    save = config.checkpoint.save
    folders = [folder for folder in run_folders(config) if is_main or folder.path == save]
    found = []
    if log_dir is not None and (reason := _obstacle(Path(log_dir))):
        found.append(f"--log-dir={log_dir} cannot be written to: {reason}")
    for folder in folders:
        if reason := _obstacle(Path(folder.path)):
            found.append(f"{folder.complaint}: {reason}")
        elif user := running_here(folder, os.environ):
            found.append(user)
    checkpoint = config.checkpoint
    found += filter(None, [load_problem(checkpoint), pretrained_problem(checkpoint)])
    if save is not None and not config.checkpoint.resumes:
        found += filter(None, [foreign_checkpoints(Path(save))])
    return found


def _obstacle(folder: Path) -> str | None:
    path = folder.absolute()
    present = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not os.path.isdir(present):
        return f"{present} is no folder"
    effective = os.access in os.supports_effective_ids
    if not os.access(present, os.W_OK | os.X_OK, effective_ids=effective):
        return f"no permission to write in {present}"
    return None


def make_log_folder(folder: str | None) -> None:
    """Make the folder of log files; InputError if that cannot be."""
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"--log-dir={folder} cannot be made: {error.strerror}") from error


def check_rendezvous(endpoint: str, is_host: bool, patience: float = NAME_PATIENCE) -> None:
    """InputError if the host of `endpoint` has no address, or cannot listen there if this is it."""
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    wait_for_name(host, f"--rdzv-endpoint={endpoint}", patience)
    if is_host and (reason := port_problem(int(port))):
        raise InputError(
            f"--rdzv-endpoint={endpoint}: port {port} of this machine cannot be used: {reason}: "
            "choose another one (MASTER_PORT), the same on all machines"
        )


def local_address(endpoint: str) -> str | None:
    """Where others reach this machine, None where its own name says so.

    InputError if neither the name nor the way to `endpoint` leads to an address of it.
    """
    if not leads_to_loopback(socket.getfqdn()):
        return None
    address = route_address(endpoint.rpartition(":")[0].strip("[]"))
    if address is None or is_loopback(address):
        address = outward_address()
    if address is None:
        raise InputError(
            f"the name of this machine, {socket.getfqdn()}, leads only to itself, and none of its "
            "addresses is clearly the one that others use: set LOCAL_ADDR (--local-addr)"
        )
    return address


def default_processes(config: Config) -> int:
    """A process per GPU of this machine where the run takes GPUs, else one."""
    if config.train.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1


def notes(layout: Layout, max_restarts: int) -> list[str]:
    """Warnings about legal but suspicious settings."""
    found, config, nproc_per_node = [], layout.config, layout.node_size
    checkpoint, shards = config.checkpoint, layout.dims.tp
    if max_restarts and not checkpoint.resumes:
        found.append(
            "a restart begins anew: checkpoint.save and checkpoint.load do not name one folder"
        )
    if nproc_per_node % shards:
        found.append(
            f"tensor-parallel groups of {shards} span nodes of {nproc_per_node} processes: slow"
        )
    risks = accumulation_risks(config, layout.dims.dp)
    return [*found, *_note_of_nodes(layout), *_note_of_balance(layout), *risks]


def _note_of_balance(layout: Layout) -> list[str]:
    parallel, uneven = layout.config.parallel, layout.imbalance
    if uneven <= UNEVEN:
        return []
    if parallel.partition == "tensor":
        why = (
            f"whole tensors do not go round {layout.dims.dp} replicas, parallel.partition=even does"
        )
    elif parallel.overlap_param_gather:
        why = "row blocks of small buckets go to few, a larger parallel.ddp_bucket_size to more"
    else:
        why = (
            "row blocks are as many bytes of weights, of which tables have two per parameter; "
            "parallel.overlap_param_gather=true cuts them in every bucket"
        )
    return [f"a process owns {uneven:.1f} times the mean of the optimizer states: {why}"]


def _note_of_nodes(layout: Layout) -> list[str]:
    """Where as many replicas as a machine has would sum on it, if only they divided all."""
    parallel, replicas = layout.config.parallel, layout.dims.dp
    here, rest = divmod(layout.node_size, layout.dims.stride("dp"))
    summed = layout.config.precision.grad_reduce == "fp32_accumulate"
    if not summed or parallel.node_size or rest or replicas % here == 0 or not 1 < here < replicas:
        return []
    together = _summed_per_node(layout)
    how = f"in groups of {together}" if together else "one by one"
    return [
        f"machines have room for {here} replicas of a stage, which do not divide {replicas}: "
        f"gradients cross between machines {how}"
    ]
