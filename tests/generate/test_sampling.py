"""The choice of a token: what may be chosen, how often, and that a seed decides it."""

from __future__ import annotations

import pytest
import torch

from fp8lm.generate.sampling import Sampling, choose
from fp8lm.runtime.errors import InputError

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def chosen(count, logits=LOGITS, so_far=(), seed=0, **keys):
    sampling = Sampling(**{"temperature": 1.0, "top_k": None, **keys})
    generator = torch.Generator().manual_seed(seed)
    return [choose(logits, so_far, sampling, generator) for _ in range(count)]


def test_frequencies_are_the_softmax_at_the_temperature():
    counts = torch.bincount(torch.tensor(chosen(4000, temperature=2.0)), minlength=5)
    expected = (LOGITS / 2.0).softmax(0)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() < 4 * deviation).all()


def test_greedy_is_the_first_of_the_likeliest():
    assert chosen(3, torch.tensor([1.0, 5.0, 5.0]), temperature=0.0) == [1, 1, 1]


def test_top_k_and_top_p_leave_the_likeliest():
    assert set(chosen(500, top_k=2)) == {1, 3}
    # Probabilities 0.64, 0.23, 0.09, ..: two reach 0.8, one 0.6.
    assert set(chosen(500, top_p=0.8)) == {1, 3}
    assert set(chosen(500, top_p=0.6)) == {1}
    assert set(chosen(500, top_p=1.0)) == {0, 1, 2, 3, 4}
    assert set(chosen(500, top_k=3, top_p=0.95)) == {1, 2, 3}


def test_repetition_penalty_makes_what_was_there_less_likely():
    assert chosen(1, so_far=[1, 1], temperature=0.0, repetition_penalty=2.0) == [3]
    negative = torch.tensor([-1.0, -1.5])  # which a quotient would make likelier
    assert chosen(1, negative, so_far=[0], temperature=0.0, repetition_penalty=2.0) == [1]
    assert chosen(1, so_far=[], temperature=0.0, repetition_penalty=2.0) == [1]


def test_a_seed_decides():
    assert chosen(50, seed=1) == chosen(50, seed=1) != chosen(50, seed=2)
    first, second = (Sampling(seed=3).generator(number) for number in (0, 1))
    assert first.initial_seed() != second.initial_seed()
    next_seed = Sampling(seed=4).generator(0)  # of the second of a seed it is no repetition
    assert second.initial_seed() != next_seed.initial_seed()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite(value, temperature):
    with pytest.raises(InputError, match="not finite"):
        chosen(1, torch.tensor([0.0, value, 1.0]), temperature=temperature)
