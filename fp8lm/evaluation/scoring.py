"""Log-likelihoods of many texts: in batches, and shared between replicas of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from fp8lm.checkpoint.collectives import from_all
from fp8lm.generate.model import InferenceModel

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    """`tokens`, of which the last `scored` are scored, each after all tokens before it."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Score:
    """`losses` (fp32, nats) of the scored tokens of a passage, and whether each is likeliest."""

    losses: Tensor
    likeliest: Tensor

    @property
    def nats(self) -> float:
        """Minus the log-likelihood of all."""
        return self.losses.double().sum().item()

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written the scored tokens."""
        return bool(self.likeliest.all())


def windows(tokens: Sequence[int], prefix: int, window: int, stride: int) -> list[Passage]:
    """Every token once, after at most `window` tokens; each passage scores `stride` (the first
    `window`, the last what is left).

    The first token is read after `prefix`, a token that ends documents.
    """
    whole = [prefix, *tokens]
    passages = []
    done = 0  # tokens that were scored
    while done < len(tokens):
        size = min(stride if done else window, len(tokens) - done)
        done += size
        passages.append(Passage(list(whole[max(0, done - window) : done + 1]), size))
    return passages


def score_all(
    model: InferenceModel, passages: Sequence[Passage], batch_size: int, what: str = "scoring"
) -> list[Score]:
    """The scores of all `passages`, in their order; a collective of all ranks.

    Long ones come first, so that those of a batch are about as long.
    """
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].tokens))

    def of_batch(numbers: Sequence[int]) -> list[Score]:
        batch = [passages[i] for i in numbers]
        found = model.score([p.tokens for p in batch], [p.scored for p in batch])
        return [Score(losses, likeliest) for losses, likeliest in found]

    found = shared_out(model, order, batch_size, of_batch, what)
    return [found[i] for i in range(len(passages))]


def shared_out(
    model: InferenceModel,
    order: Sequence[int],
    batch_size: int,
    of_batch: Callable[[Sequence[int]], list[T]],
    what: str,
) -> dict[int, T]:
    """`of_batch` of all items by number, in batches of `order` that the replicas share.

    A collective of all ranks, with a progress bar on the first.
    """
    replicas = model.groups.data_parallel
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own: dict[int, T] = {}
    hidden = None if model.groups.is_main else True
    for numbers in tqdm(batches[replicas.rank() :: replicas.size()], desc=what, disable=hidden):
        own |= zip(numbers, of_batch(numbers), strict=True)
    gathered = from_all(model.groups.world, own)
    return {number: result for rank in gathered for number, result in rank.items()}
