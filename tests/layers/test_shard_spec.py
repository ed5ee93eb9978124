"""Which elements of a logical tensor a rank holds, three ways: values, indices, blocks."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.checkpoint import Shard
from fp8lm.layers.shard_spec import REPLICATED, ShardSpec

CASES = [((8, 3), 0, 1), ((8, 3), 0, 2), ((3, 8), 1, 1), ((2, 8, 3), 1, 2), ((16,), 0, 2)]
SIZES = [1, 2, 4]


def logical(shape):
    return torch.arange(math.prod(shape), dtype=torch.int32).view(shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("shape", "dim", "num_sections"), CASES)
def test_element_index_is_where_the_values_come_from(shape, dim, num_sections, size):
    for rank in range(size):
        shard_spec = ShardSpec(dim, num_sections, rank, size)
        local = shard_spec.take(logical(shape))
        assert local.shape == shard_spec.local_shape(shape)
        assert local.is_contiguous()
        # In pieces, as the optimizer asks for them.
        middle, count = local.numel() // 3, local.numel()
        spans, cpu = ((0, middle), (middle, count)), torch.device("cpu")
        whole = shard_spec.element_index(shape)
        index = [whole.numbers(start, stop - start, cpu) for start, stop in spans]
        # And of a part that begins there, of which the first element is left out.
        part = shard_spec.element_index(shape, middle - 1)
        assert torch.equal(part.numbers(1, count - middle, cpu), index[1])
        assert torch.equal(torch.cat(index), local.flatten())
        assert index[0].dtype == torch.int32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("shape", "dim", "num_sections"), CASES)
def test_blocks_put_the_tensor_together_again(shape, dim, num_sections, size):
    global_shape = ShardSpec(dim, num_sections).sections(shape)[0]
    whole = torch.full(global_shape, -1, dtype=torch.int32)
    for rank in range(size):
        shard_spec = ShardSpec(dim, num_sections, rank, size)
        assert shard_spec.sections(shape)[0] == global_shape  # whatever the number of ranks
        local = shard_spec.take(logical(shape)).clone()
        shard = Shard(shard_spec.as_block(local), *shard_spec.sections(shape))
        assert shard.tensor.data_ptr() == local.data_ptr()  # loading fills the weight
        place = tuple(
            slice(start, start + n)
            for start, n in zip(shard.offset, shard.tensor.shape, strict=True)
        )
        whole[place] = shard.tensor
    assert torch.equal(whole.view(shape), logical(shape))


def test_gate_and_up_are_cut_separately():
    rows = torch.arange(8)
    assert ShardSpec(0, 2, 0, 2).take(rows).tolist() == [0, 1, 4, 5]
    assert ShardSpec(0, 2, 1, 2).take(rows).tolist() == [2, 3, 6, 7]


def test_whole():
    x = logical((3, 5))
    assert REPLICATED.is_whole
    assert REPLICATED.take(x) is x
    assert REPLICATED.sections((3, 5)) == ((3, 5), (0, 0))


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        ShardSpec(0, 2, 0, 2).local_shape((6, 4))
