"""On a GPU the host does not know whether a step is skipped: every write is masked instead."""

from __future__ import annotations

import math

import pytest

from tests.optim.bench import all_bytes, assert_same_bytes, step
from tests.optim.test_skip import SETTINGS, bad_step, make


def masked(setting):
    """An optimizer that masks its writes on a CPU too."""
    adam = make(setting)
    adam.masks_writes = True
    return adam


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_mask_that_is_off_changes_nothing_about_the_step(setting):
    one, other = masked(setting), make(setting)
    for adam in (one, other):
        step(adam, 3)
    assert_same_bytes(all_bytes(one), all_bytes(other))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_mask_that_is_on_keeps_every_byte(setting):
    adam = masked(setting)
    before = all_bytes(adam)
    for event in (math.nan, math.inf):
        assert bad_step(adam, "linear", event).skip
    assert_same_bytes(before, all_bytes(adam))
    step(adam, 3)
    with pytest.raises(AssertionError):
        assert_same_bytes(before, all_bytes(adam))
