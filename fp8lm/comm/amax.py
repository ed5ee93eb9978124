"""The absolute maximum of a tensor whose shards lie on several ranks.

A logical tensor has one scale, whatever the layout: its amax is reduced over the ranks that hold
its shards *before* they are cast, so that shard-then-quantize equals quantize-then-shard bit for
bit. One exchange serves a whole batch of tensors.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm.accounting import Wire
from fp8lm.comm.handles import Handle
from fp8lm.comm.transport import all_reduce_max

_MAGNITUDE = 0x7FFFFFFF


def max_over_group(amaxes: Tensor, group: dist.ProcessGroup, wire: Wire) -> Handle[Tensor]:
    """Elementwise maximum of `amaxes` (fp32, any shape, not negative) over the ranks of `group`.

    Reduced as integers, whose order on the bits is NaN > Inf > finite: gloo's maximum of floats
    answers with a number where one rank has a NaN. The result is a new tensor.
    """
    if amaxes.dtype != torch.float32:
        raise TypeError(f"amaxes are fp32, not {amaxes.dtype}")
    # Without the sign: x86 makes the NaN of Inf * 0 negative, the smallest of integers.
    bits = amaxes.contiguous().view(torch.int32) & _MAGNITUDE
    return all_reduce_max(bits, group, wire).then(lambda largest: largest.view(torch.float32))
