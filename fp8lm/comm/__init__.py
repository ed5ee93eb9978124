"""Process groups, and collectives of scaled tensors."""

from fp8lm.comm.accounting import Wire, WireCounter
from fp8lm.comm.amax import max_over_group
from fp8lm.comm.gather import (
    all_gather,
    all_gather_scalars,
    all_gather_values,
    broadcast,
)
from fp8lm.comm.handles import Handle
from fp8lm.comm.message import MessageLayout
from fp8lm.comm.reduce import all_reduce, reduce_scatter
from fp8lm.comm.transport import (
    all_gather_bytes,
    all_gather_uneven,
    all_to_all_bytes,
    reduce_scatter_fp8,
    shift_bytes,
    sums_fp8,
)

__all__ = [
    "Handle",
    "MessageLayout",
    "Wire",
    "WireCounter",
    "all_gather",
    "all_gather_bytes",
    "all_gather_scalars",
    "all_gather_uneven",
    "all_gather_values",
    "all_reduce",
    "all_to_all_bytes",
    "broadcast",
    "max_over_group",
    "reduce_scatter",
    "reduce_scatter_fp8",
    "shift_bytes",
    "sums_fp8",
]
