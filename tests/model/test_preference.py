"""The losses of preferences against their published equations, and what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fp8lm.batch import Batch
from fp8lm.model.preference import PreferenceOptimization

VOCABULARY, LENGTH = 7, 12
# Of two samples: two pairs and padding, one pair.
BOUNDS = torch.tensor([[0, 3, 5, 8, 10], [0, 5, 12, 12, 12]])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
    mask = (torch.rand(2, LENGTH, generator=generator) < 0.6).float()
    mask[:, BOUNDS[:, 1:] - 1] = 1.0  # every answer has a token
    mask[0, 10:] = 0.0
    reference = torch.rand(2, LENGTH, generator=generator) * 3
    return Batch(labels, labels, mask, sequence_bounds=BOUNDS, reference_losses=reference)


@pytest.fixture
def logits():
    return torch.randn(LENGTH, 2, VOCABULARY, generator=torch.Generator().manual_seed(2))


def by_the_equations(logits, batch, *, beta, loss_type, smoothing, per_token, sft):
    """Mean loss over the three pairs, one after the other, in double precision."""
    log_p = logits.double().transpose(0, 1).log_softmax(-1).gather(-1, batch.labels[..., None])
    log_p, log_ref = log_p.squeeze(-1), -batch.reference_losses.double()
    losses, margins = [], []
    for sample, first in ((0, 0), (0, 2), (1, 0)):
        ratio, likelihood = [], []
        for number in (first, first + 1):
            answer = slice(*BOUNDS[sample, number : number + 2].tolist())
            mask = batch.loss_mask[sample, answer].double()
            length = mask.sum() if per_token else 1.0
            total = (log_p[sample, answer] * mask).sum()
            ratio.append((total - (log_ref[sample, answer] * mask).sum()) / length)
            likelihood.append(total / mask.sum())
        margin = ratio[0] - ratio[1]
        if loss_type == "ipo":
            loss = (margin - 1 / (2 * beta)) ** 2
        else:
            loss = -(1 - smoothing) * functional.logsigmoid(beta * margin)
            loss = loss - smoothing * functional.logsigmoid(-beta * margin)
        losses.append(loss - sft * likelihood[0])
        margins.append(beta * margin)
    return torch.stack(losses).mean(), torch.stack(margins).detach()


CASES = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.1},
    {"beta": 0.3, "loss_type": "ipo"},
    {"beta": 2.0, "length_normalized": True},
    {"beta": 0.3, "sft_loss_weight": 0.5},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_losses_and_gradients_are_those_of_the_equations(keys, logits, batch):
    expected_logits = logits.clone().requires_grad_()
    expected, margins = by_the_equations(
        expected_logits,
        batch,
        beta=keys["beta"],
        loss_type=keys.get("loss_type", "sigmoid"),
        smoothing=keys.get("label_smoothing", 0.0),
        per_token=keys.get("length_normalized", False),
        sft=keys.get("sft_loss_weight", 0.0),
    )
    expected.backward()
    own = logits.clone().requires_grad_()
    objective = PreferenceOptimization(**keys)
    share = objective.counted_share([batch])
    assert share == torch.tensor(3 / (2 * LENGTH))
    loss, *metrics = (x / share for x in objective.loss_and_metrics(own, batch))
    loss.backward()
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(own.grad, expected_logits.grad)
    found = dict(zip(objective.metrics, metrics, strict=True))
    torch.testing.assert_close(found["rewards/margins"], margins.mean().float())
    torch.testing.assert_close(found["rewards/accuracies"], (margins > 0).double().mean().float())
    torch.testing.assert_close(
        found["rewards/chosen"] - found["rewards/rejected"], found["rewards/margins"]
    )


def test_nothing_waits_for_a_device(logits, batch):
    """On the meta device, where reading a value is an error."""
    meta = torch.device("meta")
    objective, there = PreferenceOptimization(sft_loss_weight=0.1), batch.to(meta)
    objective.counted_share([there])
    found = objective.loss_and_metrics(logits.to(meta).requires_grad_(), there)
    found[0].backward()
    assert {value.device for value in found} == {meta}


def test_a_model_that_is_the_reference_has_no_margin_and_no_divergence(logits, batch):
    objective = PreferenceOptimization()
    own = objective.token_losses(logits, batch)
    same = Batch(
        batch.tokens, batch.labels, batch.loss_mask, sequence_bounds=BOUNDS, reference_losses=own
    )
    share = objective.counted_share([same])
    loss, *metrics = objective.loss_and_metrics(logits, same)
    found = dict(zip(objective.metrics, metrics, strict=True))
    torch.testing.assert_close(loss / share, torch.tensor(math.log(2.0)))
    assert found["rewards/margins"] == found["kl"] == 0.0
    assert found["rewards/accuracies"] / share == 0.5
