"""What is in a checkpoint, tensor by tensor."""

from __future__ import annotations

import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import read_tensor, stored_tensors
from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32, ROOT_E4M4
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = ReferenceKernels()
FORMATS = {fmt.dtype: fmt for fmt in (E4M3, E5M2, ROOT_E4M4, FP16, BF16, FP32)}


def contents(folder):
    """All of a checkpoint, FP8 payloads in their own dtype."""
    checkpoint = open_checkpoint(folder)
    return {name: read_tensor(checkpoint, t) for name, t in stored_tensors(checkpoint).items()}


def values(tensors, name):
    """What payload and scale say, in fp32."""
    payload = tensors[f"{name}.payload"]
    fmt = FORMATS[payload.dtype]
    scale = tensors.get(f"{name}.scale", torch.ones(()))
    return KERNELS.dequantize(ScaledTensor(payload.view(fmt.storage), scale, fmt))


def expect(tensors, name, cast):
    """`name` is `cast`, byte for byte."""
    payload = tensors[f"{name}.payload"]
    assert payload.dtype == cast.format.dtype
    assert torch.equal(payload.view(cast.format.storage), cast.payload), name
    if cast.format.scaled:
        assert torch.equal(tensors[f"{name}.scale"], cast.scale), name
