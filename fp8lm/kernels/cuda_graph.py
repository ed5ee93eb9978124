"""Capture and replay of device work: the launches of a function, later issued again as one.

A replay runs the kernels of the capture with the addresses and numbers that they were launched with
then. What is to differ must be in tensors that stay where they are; what the host did beside is not
done again. (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], None]


class GraphCapture(Protocol):
    """Captures functions that launch work on one device."""

    def run(self, work: Callable[[], T]) -> T:
        """`work()`, as it is, where captures are made: to warm up, or between replays."""

    def pool(self) -> Any:
        """Memory for captures that come and go together; see `capture`."""

    def capture(self, work: Callable[[], T], pool: Any) -> tuple[Replay, T]:
        """A function that replays what `work` launches, and what `work` returns.

        Nothing is computed before the first replay. Tensors in the result are where every replay
        writes them. Captures in one `pool` overwrite each other's intermediate results: they are
        replayed in the order in which they were made, one after the other. RuntimeError where
        `work` waits for the device, or cannot be replayed.
        """


class CudaGraphs:
    """`GraphCapture` by CUDA graphs on one stream; all else, other threads too, runs as ever.

    A pool of which all graphs are gone takes no new ones: PyTorch fails an assertion.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], T]) -> T:
        """See `GraphCapture`."""
        # On the stream of captures: autograd remembers on which one a leaf was first used.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def pool(self) -> Any:
        """See `GraphCapture`."""
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], T], pool: Any) -> tuple[Replay, T]:
        """See `GraphCapture`."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a thread that saves a checkpoint may wait for its copies meanwhile.
        capturing = torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with _no_collection(), capturing:
            result = work()
        return graph.replay, result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect now, and not before the end: what is freed then, another graph, ends a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
