"""An asynchronous collective: computation goes on until `wait()` is called for its result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Handle(Generic[T]):
    """The result of a collective that has started; `wait()` must be called once.

    `finish` waits for the bytes and completes the arithmetic. It also holds what is being sent:
    gloo reads a buffer after the call that sends it has returned, and memory freed and reused
    meanwhile would be sent instead. After `wait()` nothing is held.

    All ranks of a group start their collectives in the same order. They also wait in the same
    order where `wait()` starts a second transfer (`all_reduce`).
    """

    __slots__ = ("_finish",)

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    @classmethod
    def done(cls, value: T) -> Handle[T]:
        """The handle of a result that is there already (a group of one rank)."""
        return cls(lambda: value)

    def wait(self) -> T:
        """The result; RuntimeError when called again.

        On a GPU with NCCL this orders streams and does not stop the host.
        """
        return self._take()()

    def then(self, function: Callable[[T], U]) -> Handle[U]:
        """A handle whose `wait()` is `function(self.wait())`; it replaces this one."""
        finish = self._take()
        return Handle(lambda: function(finish()))

    def _take(self) -> Callable[[], T]:
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("this collective has been waited for already")
        return finish

    def __del__(self) -> None:
        # Not while an exception propagates: it is the cause.
        if self._finish is not None and sys.exception() is None:
            warnings.warn("a collective was never waited for", RuntimeWarning, stacklevel=2)
