"""Launches that are declared to the recorder of the context."""

import pytest
import torch

from fp8lm.kernels.cost import declare_launch, recording


class Launches:
    def __init__(self):
        self.seen = []

    def record(self, name, reads, writes):
        self.seen.append((name, reads, writes))


def test_bytes_of_what_is_read_and_written():
    launches = Launches()
    x = torch.empty(16, 32, dtype=torch.bfloat16, device="meta")
    payload = torch.empty(16, 32, dtype=torch.uint8, device="meta")
    scale = torch.empty((), device="meta")
    with recording(launches):
        declare_launch("cast", [x, scale], [payload])
        declare_launch("transpose", [payload], [payload, payload])
    assert launches.seen == [("cast", 1024 + 4, 512), ("transpose", 512, 1024)]


def test_only_the_innermost_recorder_gets_a_launch_and_none_outside():
    outer, inner = Launches(), Launches()
    x = torch.empty(4, device="meta")
    declare_launch("before", [x], [])
    with recording(outer):
        with pytest.raises(KeyError), recording(inner):
            declare_launch("inside", [x], [])
            raise KeyError
        declare_launch("after", [], [x])
    declare_launch("outside", [x], [])
    assert inner.seen == [("inside", 16, 0)]
    assert outer.seen == [("after", 0, 16)]


def test_backward_on_the_meta_device_is_of_the_same_context():
    class Declared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            declare_launch("backward", [dy], [dy])
            return dy * 2

    launches = Launches()
    x = torch.empty(4, device="meta", requires_grad=True)
    with recording(launches):
        Declared.apply(x).sum().backward()
    assert [name for name, _, _ in launches.seen] == ["backward"]
