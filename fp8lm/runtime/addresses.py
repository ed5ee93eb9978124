"""The address and network interface under which other machines reach this one."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import time
from contextlib import suppress

import psutil

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.streams import say

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # where gloo and NCCL listen
NAME_PATIENCE = 60.0  # seconds
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # RFC 5737, RFC 3849: addresses that nobody has


def wait_for_name(host: str, given: str, patience: float = NAME_PATIENCE) -> None:
    """InputError if `host`, which the user has `given`, has no address after so many seconds.

    A cluster may give the first machine its name a little later than it starts the others. What
    cannot be a name is refused at once.
    """
    deadline, announced = time.monotonic() + patience, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except UnicodeError as error:  # of the codec of names: an empty or too long part
            raise InputError(f"{given}: {host} is no name of a machine: {error}") from error
        except OSError as error:
            if not announced:
                say(f" waiting for a machine named {host}")
                announced = True
            if time.monotonic() >= deadline:
                raise InputError(f"{given}: no machine of that name: {error.strerror}") from error
        time.sleep(1.0)


def port_problem(port: int) -> str | None:
    """Why no program can listen at `port` of this machine; None if it can."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def route_address(host: str) -> str | None:
    """This machine's address on the way to `host`, None if there is none; nothing is sent."""
    with suppress(OSError, UnicodeError):
        for family, kind, *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
    return None


def outward_address() -> str | None:
    """The address of the default route, or of the only interface; None if there is none."""
    for elsewhere in _ELSEWHERE:
        if (address := route_address(elsewhere)) and not is_loopback(address):
            return address
    found = [address for name in psutil.net_if_addrs() if (address := address_of(name))]
    found = [address for address in found if not is_loopback(address)]
    return found[0] if len(found) == 1 else None


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has `address`."""
    for name, entries in psutil.net_if_addrs().items():
        if any(_bare(entry.address) == _bare(address) for entry in entries):
            return name
    return None


def address_of(interface: str) -> str | None:
    """An address of `interface`, IPv4 if it has one; None if it has none or does not exist."""
    entries = psutil.net_if_addrs().get(interface, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in entries:
            if entry.family == family:
                return _bare(entry.address)
    return None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address`."""
    try:
        return ipaddress.ip_address(_bare(address)).is_loopback
    except ValueError:
        return False


def leads_to_loopback(name: str) -> bool:
    """Whether a machine's `name` has no address here, or only such as no other machine reaches."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return True
    return all(map(is_loopback, found))


def network_id() -> str:
    """What two processes have in common exactly if they share a loopback interface (on Linux)."""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return platform.node()


def _bare(address: str) -> str:
    return address.partition("%")[0]  # without the interface of a link-local one
