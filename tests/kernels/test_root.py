"""Roots against numpy's, which are rounded correctly."""

from __future__ import annotations

import math

import numpy as np
import torch

from fp8lm.kernels.root import inverse_root, root


def numbers():
    """Of all magnitudes, subnormals and an odd number of them included."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1, 0x7F800000, (100_003,), generator=generator, dtype=torch.int32)
    special = torch.tensor([0.0, 1.0, 2.0**-149, math.inf, math.nan])
    return torch.cat((bits.view(torch.float32), special))


def inverse(x):
    with np.errstate(divide="ignore"):
        return (np.float32(1.0) / x).astype(np.float32)


def test_inverse_roots_are_rounded_once_at_each_operation():
    x = numbers()
    expected = inverse(np.sqrt(x.numpy()))
    np.testing.assert_array_equal(inverse_root(x).numpy(), expected)
    np.testing.assert_array_equal(root(x).numpy(), inverse(expected))


def test_a_root_is_three_roundings_away():
    x = numbers()[:-2]
    exact = x.double().sqrt()
    assert ((root(x).double() - exact).abs() <= 3.001 * 2.0**-24 * exact).all()
    assert root(torch.zeros(3)).tolist() == [0.0] * 3
