"""On a GPU the host does not know whether a step is skipped: every write is masked instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8lm.optim.clipping import gradient_norm
from tests.optim.bench import LR, all_bytes, assert_same_bytes, random_gradients, set_gradients
from tests.optim.test_skip import SETTINGS, make


def update(adam, skip):
    """One update of `adam` whose coefficients carry the mask `skip`."""
    gradients = {name: weight.main_grad.value for name, weight in adam.weights.items()}
    norm = gradient_norm(list(gradients.values()), 1.0, adam.kernels)
    coefficients = replace(adam._coefficients(LR, norm, None), skip=skip)
    adam._update(coefficients, adam.amax.clone(), norm.amax, gradients)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_mask_that_is_off_changes_nothing_about_the_step(setting):
    masked, plain = make(setting), make(setting)
    for adam, skip in ((masked, torch.tensor(False)), (plain, None)):
        set_gradients(adam.weights, random_gradients(adam.weights, 3))
        update(adam, skip)
    assert_same_bytes(all_bytes(plain), all_bytes(masked))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_mask_that_is_on_keeps_every_byte(setting):
    adam = make(setting)
    set_gradients(adam.weights, random_gradients(adam.weights, 3))
    before = all_bytes(adam)
    update(adam, torch.tensor(True))
    assert_same_bytes(before, all_bytes(adam))
    update(adam, torch.tensor(False))
    with pytest.raises(AssertionError):
        assert_same_bytes(before, all_bytes(adam))
