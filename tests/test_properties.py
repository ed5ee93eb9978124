"""What holds of every sharding, buffer and message, for cases that hypothesis thinks of."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lm.comm import MessageLayout
from fp8lm.layers.shard_spec import ShardSpec
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32
from fp8lm.parallel.param_layout import BufferEntry, assign_whole_tensors, shard_rows
from fp8lm.parallel.stages import layer_ranges
from fp8lm.scaled_tensor import ScaledTensor

CPU = torch.device("cpu")
# The same cases in every run: a failure here is a failure everywhere.
often = settings(derandomize=True, deadline=None, max_examples=80)
small = st.integers(1, 6)


@st.composite
def shardings(draw):
    """A full tensor of distinct numbers, and how it is sharded: dimension, sections, ranks."""
    sections, size, dim = draw(small), draw(small), draw(st.integers(0, 2))
    shape = [draw(st.integers(1, 4)) for _ in range(3)]
    shape[dim] = sections * size * draw(st.integers(1, 3))
    count = shape[0] * shape[1] * shape[2]
    return torch.arange(count, dtype=torch.int32).view(shape), dim, sections, size


@often
@given(shardings())
def test_every_element_is_on_one_rank(case):
    full, dim, sections, size = case
    found = []
    for rank in range(size):
        spec = ShardSpec(dim, sections, rank, size)
        own = spec.take(full)
        assert tuple(own.shape) == spec.local_shape(tuple(full.shape))
        index = spec.element_index(tuple(full.shape)).numbers(0, own.numel(), CPU)
        assert torch.equal(full.view(-1)[index.long()], own.reshape(-1))
        found.append(index)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(full.numel()).int())


@st.composite
def entries(draw):
    """Tensors of a model in one or more parts, of any size and width of element."""
    number = itertools.count()
    sizes = st.tuples(st.integers(1, 40), st.integers(1, 24), st.sampled_from([1, 2, 4]))
    part = st.lists(sizes, min_size=1, max_size=5)
    return [
        [BufferEntry(f"w{next(number)}", *size) for size in sizes_of_part]
        for sizes_of_part in draw(st.lists(part, min_size=1, max_size=3))
    ]


@often
@pytest.mark.parametrize("place", [assign_whole_tensors, shard_rows])
@given(parts=entries(), num_ranks=st.integers(1, 9))
def test_every_row_has_one_owner_who_holds_it(place, parts, num_ranks):
    for tensors, layout in zip(parts, place(parts, num_ranks), strict=True):
        first = [0, *itertools.accumulate(layout.shard_bytes)]
        taken = []
        for tensor in tensors:
            start = layout.start[tensor.name]
            taken.append((start, start + tensor.nbytes))
            owners = [0] * tensor.rows
            for rank, rows in enumerate(layout.rows):
                low, high = rows.get(tensor.name, (0, 0))
                for row in range(low, high):
                    owners[row] += 1
                    begin = start + row * tensor.row_bytes
                    assert first[rank] <= begin and begin + tensor.row_bytes <= first[rank + 1]
            assert owners == [1] * tensor.rows
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(sorted(taken)))


@often
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
            st.sampled_from([E4M3, E5M2, FP16, BF16, FP32]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31 - 1),
)
def test_a_message_brings_every_byte(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape, fmt in parts:
        tensor = ScaledTensor.zeros(tuple(shape), fmt, CPU)
        payload = tensor.payload.view(torch.uint8)
        payload.copy_(torch.randint(0, 256, payload.shape, generator=generator))
        if fmt.scaled:
            tensor.scale.fill_(2.0 ** int(torch.randint(-30, 30, (), generator=generator)))
        tensors.append(tensor)
    layout = MessageLayout.of(tensors)
    message = layout.pack(tensors)
    assert message.numel() == layout.nbytes and layout.nbytes % 16 == 0
    for sent, received in zip(tensors, layout.views(message), strict=True):
        assert torch.equal(sent.payload.view(torch.uint8), received.payload.view(torch.uint8))
        assert torch.equal(sent.scale, received.scale)


@often
@given(
    st.integers(1, 40), st.integers(1, 8), st.integers(1, 4),
    st.none() | st.integers(0, 6), st.none() | st.integers(0, 6),
)  # fmt: skip
def test_every_layer_is_on_one_stage(layers, stages, chunks, first, last):
    try:
        ranges = layer_ranges(layers, stages, chunks, first, last)
    except ValueError:
        assert stages * chunks > 1  # one stage has all layers, whatever its ends are told
        return
    assert len(ranges) == stages * chunks
    assert [layer for own in ranges for layer in own] == list(range(layers))
    if stages * chunks > 1:
        assert first is None or len(ranges[0]) == first
        assert last is None or len(ranges[-1]) == last
