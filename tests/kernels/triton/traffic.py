"""Counts the bytes that kernels really move in the interpreter, to compare with the declared."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from fp8lm.kernels.cost import recording


class Traffic:
    """Of every launch its name, and the bytes it reads and writes, each address counted once."""

    def __init__(self):
        self.declared = []
        self._touched = []

    def record(self, name, reads, writes):
        """See `CostRecorder`."""
        self.declared.append((name, reads, writes))
        self._touched.append(([], []))

    def touch(self, kind, pointers, mask):
        """The running kernel accesses these pointers where `mask` is set; kind 0 reads."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self._touched[-1][kind].append((size, np.unique(pointers.data[mask.data])))

    @property
    def measured(self):
        """What `declared` should be."""
        names = (name for name, _, _ in self.declared)
        return [
            (name, *map(_bytes, touched))
            for name, touched in zip(names, self._touched, strict=True)
        ]


def _bytes(accesses):
    sizes = {size for size, _ in accesses}
    return sum(
        size * len(np.unique(np.concatenate([where for other, where in accesses if other == size])))
        for size in sizes
    )


@contextmanager
def counting():
    """A `Traffic` that counts inside the context."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    update = InterpreterBuilder.create_atomic_rmw

    def counted_load(builder, pointers, mask, *args):
        traffic.touch(0, pointers, mask)
        return load(builder, pointers, mask, *args)

    def counted_store(builder, pointers, value, mask, *args):
        traffic.touch(1, pointers, mask)
        return store(builder, pointers, value, mask, *args)

    def counted_update(builder, operation, pointers, value, mask, *args):
        traffic.touch(0, pointers, mask)
        traffic.touch(1, pointers, mask)
        return update(builder, operation, pointers, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch, recording(traffic):
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counted_update)
        yield traffic
