"""Checks before the processes of a job connect: each says through the job's store where it is.

Gloo listens at the address of the machine's own name. Where that is a loopback address, as on
Debian, other machines cannot reach it; so in a job of several networks every process names the
interface of its route to the others. And NCCL wants a GPU for each process.
"""

from __future__ import annotations

import json
import platform
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from fp8lm.comm.env import DistEnv
from fp8lm.runtime.addresses import (
    INTERFACES,
    address_of,
    interface_of,
    is_loopback,
    network_id,
    outward_address,
    route_address,
)
from fp8lm.runtime.errors import InputError, RunFailed

_MOST_NAMED = 8


@dataclass(frozen=True)
class Presence:
    """A process of the job: its machine, where others reach it, its GPU (None: it has none).

    Processes of one `network` share a loopback interface.
    """

    machine: str
    network: str
    address: str | None
    interface: str | None
    gpu: str | None = None

    @property
    def is_reachable(self) -> bool:
        """Whether another machine can connect to it."""
        return self.address is not None and not is_loopback(self.address)


def call_roll(
    store: dist.Store, launch: DistEnv, environment: MutableMapping[str, str], gpu: str | None
) -> list[Presence]:
    """All processes in rank order; sets `INTERFACES` in a job of several networks.

    InputError on all ranks if a machine cannot be reached by the others, or two processes have one
    GPU.
    """
    me = find_presence(environment, gpu)
    present = [Presence(**facts) for facts in exchange(store, launch, "present", asdict(me))]
    if len({each.network for each in present}) > 1:
        if not environment.get(INTERFACES[0]):  # what the user has chosen stays
            me = found_by(me, present)
        present = [Presence(**facts) for facts in exchange(store, launch, "found", asdict(me))]
    if problem := find_problem(present):
        raise InputError(problem)
    if len({each.network for each in present}) > 1 and me.interface is not None:
        for name in INTERFACES:
            environment.setdefault(name, me.interface)
    return present


def exchange(store: dist.Store, launch: DistEnv, name: str, value: object) -> list:
    """`value` of every process in rank order, through the store: no groups are needed.

    `RunFailed` where some do not come in time.
    """
    keys = [f"{name}/{rank}" for rank in range(launch.world_size)]
    try:
        store.set(keys[launch.rank], json.dumps(value))
        if launch.rank == 0:
            values = [json.loads(text) for text in _all_of(store, keys)]
            store.set(name, json.dumps(values))
        return json.loads(store.get(name))
    except dist.DistError as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFailed(f"rank {launch.rank} has no answer of rank 0 ({cause})") from error


def _all_of(store: dist.Store, keys: Sequence[str]) -> list[bytes]:
    try:
        return store.multi_get(list(keys))
    except dist.DistStoreError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        named = ", ".join(missing[:_MOST_NAMED]) + ", ..." * (len(missing) > _MOST_NAMED)
        raise RunFailed(f"{len(missing)} processes have not come: rank {named}") from error


def find_presence(environment: MutableMapping[str, str], gpu: str | None) -> Presence:
    """This process; its address is that of the user's interface, or of its way to the first."""
    machine, network = platform.node(), network_id()
    if given := environment.get(INTERFACES[0]):
        first = given.split(",")[0]
        return Presence(machine, network, address_of(first), first, gpu)
    address = route_address(environment.get("MASTER_ADDR", "").strip("[]"))
    return Presence(machine, network, address, address and interface_of(address), gpu)


def found_by(me: Presence, present: Sequence[Presence]) -> Presence:
    """`me` as processes of other networks reach it: the way to the first one may be a loopback."""
    if me.is_reachable:
        return me
    others = (p.address for p in present if p.network != me.network and p.is_reachable)
    other = next(others, None)
    address = outward_address() if other is None else route_address(other)
    return replace(me, address=address, interface=address and interface_of(address))


def find_problem(present: Sequence[Presence]) -> str | None:
    """Why these processes cannot train together, and the cure; None if they can."""
    several = len({each.network for each in present}) > 1
    for rank, each in enumerate(present):
        if several and not each.is_reachable:
            return _describe_unreachable(rank, each)
        if each.address is None and each.interface is not None:  # the user's choice
            return (
                f"{each.machine} (rank {rank}) has no network interface {each.interface} with an "
                f"address: correct {INTERFACES[0]}, or unset it"
            )
    owners: dict[str, int] = {}
    for rank, each in enumerate(present):
        if each.gpu is not None and owners.setdefault(each.gpu, rank) != rank:
            return (
                f"ranks {owners[each.gpu]} and {rank} on {each.machine} have the same GPU: NCCL "
                "needs one for each process: start as many as there are GPUs, or show each process "
                "another one (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)"
            )
    return None


def _describe_unreachable(rank: int, process: Presence) -> str:
    cure = (
        "set LOCAL_ADDR (train_multinode.sh) to its address, or GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME to its network interface"
    )
    if process.address is None and process.interface is not None:
        what = f"has no network interface {process.interface} with an address"
    elif process.address is None:
        what = "knows no address of its own that they could use"
    else:
        what = f"would give them {process.address}, which leads each of them to itself"
    return f"other machines cannot reach {process.machine} (rank {rank}): it {what}: {cure}"


def addresses_line(present: Sequence[Presence]) -> str | None:
    """Which machines meet at which addresses; None for one machine."""
    machines = {each.network: each for each in present}
    if len(machines) == 1:
        return None
    named = [f"{m.machine} {m.address} ({m.interface})" for m in machines.values()]
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return f" machines: {', '.join(named[:_MOST_NAMED])}{more}"
