"""Dropout by hash: share and scale, gradient, and what a mask depends on."""

from __future__ import annotations

import pytest
import torch

from fp8lm.layers.dropout import DropoutNoise, dropout


def noise(*samples, seed=1, first=0):
    return DropoutNoise.of_samples(torch.tensor(samples), seed, first)


def mask(of, *shape, rate=0.5):
    return dropout(torch.ones(shape), rate, of) == 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(rate):
    x = torch.randn(64, 8, 512)
    y = dropout(x, rate, noise(*range(8)))
    kept = y != 0
    # 2^18 draws: four standard deviations.
    assert abs((~kept).float().mean() - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.equal(y[kept], (x * (1 / (1 - rate)))[kept])


def test_gradient_passes_where_the_value_does():
    x = torch.randn(16, 2, 32, requires_grad=True)
    dy = torch.randn(16, 2, 32)
    y = dropout(x, 0.3, noise(0, 1))
    y.backward(dy)
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, dy * (1 / 0.7)))


def test_nothing_to_drop():
    x = torch.randn(4, 1, 8)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, noise(0)) is x


def test_parts_of_the_sequence_have_the_masks_of_the_whole():
    whole = mask(noise(3, 4), 32, 2, 16)
    parts = [mask(noise(3, 4, first=8 * rank), 8, 2, 16) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_sample_has_its_mask_wherever_it_is():
    assert torch.equal(mask(noise(3, 4), 8, 2, 16)[:, 1:], mask(noise(4), 8, 1, 16))


def distinct(masks):
    """Any two independent fair masks of 2^14 elements agree in half of them, within 5 sigma."""
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert abs((first == second).float().mean() - 0.5) < 5 * 0.5 / 2**7


def test_samples_sites_and_seeds_have_masks_of_their_own():
    base, shape = noise(5), (64, 1, 256)
    distinct(
        [mask(base, *shape), mask(noise(6), *shape), mask(noise(5, seed=2), *shape)]
        + [mask(base.at(site), *shape) for site in range(4)]
        + [mask(base.at(0).at(site), *shape) for site in range(3)]
    )
    rows = mask(base, *shape)[:, 0]
    distinct([rows[:32].flatten().repeat(2), rows[32:].flatten().repeat(2)])


def test_same_inputs_same_mask():
    assert torch.equal(mask(noise(5).at(1), 8, 1, 16), mask(noise(5).at(1), 8, 1, 16))
