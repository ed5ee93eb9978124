"""The choice of the next token.

    penalize    logit / p if it is positive, else logit * p, of every token so far      (CTRL)
    greedy      the likeliest: temperature 0
    sample      softmax(logits / temperature) of the `top_k` likeliest, of these the fewest whose
                probabilities add up to `top_p`                                         (nucleus)

CTRL: arXiv 1909.05858; nucleus sampling: arXiv 1904.09751.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.runtime.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy, and the other numbers mean nothing then.

    `repetition_penalty` 1, `top_p` 1 and `top_k` None change nothing.
    """

    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of prompt `number`, whatever batch it is in.

        The first has the seed itself. Hashes keep those of the others apart from other seeds'.
        """
        seed = self.seed
        if number:
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little")
        return torch.Generator().manual_seed(seed)


def choose(
    logits: Tensor, so_far: Collection[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """The id of the token after tokens `so_far`, from its `logits` [V] (fp32, CPU).

    Raises `InputError` for logits that are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are not fit for use")
    if sampling.repetition_penalty != 1.0 and so_far:
        logits = _penalized(logits, so_far, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, indices = logits.topk(min(sampling.top_k or len(logits), len(logits)))
    # The largest becomes 0 first, and stays 0 however small the temperature is.
    scaled = ((values - values[0]).double() / sampling.temperature).float()
    probabilities = torch.softmax(scaled, dim=0)
    before = probabilities.cumsum(0) - probabilities  # of all that are likelier
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])


def _penalized(logits: Tensor, so_far: Collection[int], penalty: float) -> Tensor:
    logits = logits.clone()
    seen = torch.tensor(sorted(set(so_far)))
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits
