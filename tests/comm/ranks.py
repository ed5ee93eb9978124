"""What the ranks of a test hold, computable by any process, and the wire they send it on."""

from __future__ import annotations

import torch

from fp8lm.comm import Wire, WireCounter
from fp8lm.kernels import ReferenceKernels

KERNELS = ReferenceKernels()
NAME = "tp_reduce"


def wire(precision="fp8"):
    """A wire with a counter of its own; `sent(wire)` reads it."""
    return Wire(NAME, precision, WireCounter())


def sent(used):
    """Bytes counted on a wire; all other wires must have sent none."""
    counted = used.counter.take()
    assert sum(counted.values()) == counted[NAME]
    return counted[NAME]


def values(rank, *shape, amplitude=1.0, dtype=torch.float32):
    """What rank `rank` holds."""
    generator = torch.Generator().manual_seed(100 + rank)
    return (torch.randn(shape, generator=generator) * amplitude).to(dtype)


def message_bytes(numel, fmt):
    """The documented size of a message that holds one tensor."""
    payload = -(-numel * fmt.bytes // 16) * 16
    return payload + (16 if fmt.scaled else 0)


def same_bits(a, b):
    """Whether two tensors of one dtype are equal bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(x):
    return x.contiguous().view(-1).view(torch.uint8)
