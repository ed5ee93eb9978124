"""Every backend defines every operation, and says what runs it."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import pytest

from fp8lm.kernels import Kernels, ReferenceKernels
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, GEMM

BACKENDS = [ReferenceKernels, HopperKernels]
if find_spec("triton"):
    from fp8lm.kernels.triton.backend import TritonKernels

    BACKENDS.append(TritonKernels)
OPERATIONS = [name for name in vars(Kernels) if not name.startswith("_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_is_inherited(backend, operation):
    own, wanted = vars(backend)[operation], vars(Kernels)[operation]
    if callable(wanted):
        assert inspect.signature(own) == inspect.signature(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_named(backend):
    assert set(backend().backends) == {GEMM, ATTENTION, ELEMENTWISE}
