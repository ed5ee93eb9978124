"""Object collectives used by checkpointing.

`group` None is the default group, or no group at all in a process that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fp8lm.runtime.errors import InputError

Group = dist.ProcessGroup | None
T = TypeVar("T")


def is_main(group: Group) -> bool:
    """Whether this process is rank 0 of `group`."""
    return not dist.is_initialized() or dist.get_rank(group) == 0


def on_main(group: Group, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and broadcast its result or its exception to all ranks."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if is_main(group):
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all(group: Group, value: T) -> list[T]:
    """`value` of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_or_error(group: Group, action: Callable[[], T]) -> T:
    """`action()` of this rank; an `InputError` of any rank is raised on all of them."""
    results: list[T] = []
    error: InputError | None = None
    try:
        results.append(action())
    except InputError as problem:
        error = problem
    for failure in from_all(group, error):
        if failure is not None:
            raise failure
    return results[0]


def my_share(group: Group, items: list[T]) -> list[T]:
    """Every n-th of `items` on n ranks, so that together they have each once."""
    if not dist.is_initialized():
        return items
    return items[dist.get_rank(group) :: dist.get_world_size(group)]
