"""Rows of a stored tensor, whatever blocks it is stored in."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint import Shard, open_checkpoint, save_checkpoint
from fp8lm.checkpoint.rows import StoredRows
from fp8lm.layers.shard_spec import ShardSpec
from fp8lm.runtime.errors import InputError

SHAPES = {"matrix": (12, 8), "vector": (12,)}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def blocks(tensor, dim, sections, size):
    """What `size` tensor-parallel ranks offer."""
    found = []
    for rank in range(size):
        spec = ShardSpec(dim, sections, rank, size)
        shape, offset = spec.sections(tuple(tensor.shape))
        found.append(Shard(spec.as_block(spec.take(tensor)).contiguous(), shape, offset))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dim", "sections", "size"),
    [
        ("matrix", 0, 1, 1),
        ("matrix", 0, 1, 3),
        ("matrix", 1, 1, 4),
        ("matrix", 0, 2, 1),
        ("matrix", 0, 2, 3),
        ("vector", 0, 1, 2),
        ("vector", 0, 2, 2),
    ],
)
def test_rows_of_any_blocks(name, dim, sections, size, dtype, tmp_path):
    whole = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0)).to(dtype)
    other = torch.zeros(5)
    shards = {"w": blocks(whole, dim, sections, size), "other": [Shard.whole(other)]}
    save_checkpoint(tmp_path, 1, shards, {})
    rows = StoredRows(open_checkpoint(tmp_path))
    assert rows.shape("w", whole.ndim) == whole.shape
    for start, stop in ((0, 12), (0, 1), (3, 9), (5, 7), (11, 12)):
        found = rows.read("w", start, stop, whole.ndim)
        assert found.dtype == dtype
        assert torch.equal(found.float(), whole[start:stop].float())


def test_numbers_that_do_not_lie_row_by_row_are_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": [Shard.whole(torch.randn(4, 6).t())]}, {})
    with pytest.raises(InputError, match="do not lie row by row"):
        StoredRows(open_checkpoint(tmp_path)).read("w", 0, 2, 2)
