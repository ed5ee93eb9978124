"""This process's place in the job, from the launcher's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8lm.runtime.errors import InputError

# One of these means that a launcher started the process; then all are needed. MASTER_ADDR and
# MASTER_PORT alone do not: clusters export them to every shell.
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_MOST_PORT = 65535
_CURE = "start with torchrun, or unset them to run one process"


@dataclass(frozen=True)
class DistEnv:
    """Number of this process in the job and on its machine, and how many there are in each.

    `restart` counts how often torchrun has restarted the processes of this machine; each of several
    `machines` counts its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    by_launcher: bool = False
    machines: int = 1
    restart: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> DistEnv:
        """Read the variables of torchrun (or a launcher that sets the same); else one process.

        InputError if variables are missing or make no sense.
        """
        if not any(environment.get(name) for name in _NUMBERS):
            return cls()
        missing = [name for name in _NUMBERS + _ADDRESS if not environment.get(name)]
        if missing:
            present = ", ".join(name for name in _NUMBERS if environment.get(name))
            raise InputError(f"{present} set but not {', '.join(missing)}: {_CURE}")
        rank, world_size, local_rank = (_number(name, environment[name]) for name in _NUMBERS)
        _number("MASTER_PORT", environment["MASTER_PORT"], 1, _MOST_PORT)
        if not (rank < world_size and local_rank < world_size):
            raise InputError(
                f"RANK={rank} and LOCAL_RANK={local_rank} must be below WORLD_SIZE={world_size}: "
                f"{_CURE}"
            )
        # Only torchrun sets it; without, all processes count as being on one machine.
        local = environment.get("LOCAL_WORLD_SIZE") or str(world_size)
        local_world_size = _number("LOCAL_WORLD_SIZE", local, 1)
        machines = _number("GROUP_WORLD_SIZE", environment.get("GROUP_WORLD_SIZE") or "1", 1)
        restarts = environment.get("TORCHELASTIC_RESTART_COUNT") or "0"
        restart = _number("TORCHELASTIC_RESTART_COUNT", restarts)
        return cls(rank, world_size, local_rank, local_world_size, True, machines, restart)


def _number(name: str, value: str, least: int = 0, most: int | None = None) -> int:
    if not value.isdecimal():
        raise InputError(f"{name}={value} is not a number: {_CURE}")
    if int(value) < least or (most is not None and int(value) > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}={value} must be {allowed}: {_CURE}")
    return int(value)
