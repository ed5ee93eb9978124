"""What is compiled ahead of time: operations at sizes of a 7B model's layers."""

import torch

from fp8lm.kernels.triton.amax import partial_amaxes

TOKENS, HIDDEN = 4096, 4096


def activations(dtype=torch.bfloat16):
    return torch.empty(TOKENS, HIDDEN, dtype=dtype)


def amax():
    partial_amaxes(activations())
