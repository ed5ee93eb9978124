"""Synthetic tokens that a model can learn: a seeded Markov chain, no files.

Each id has SUCCESSORS likely followers, drawn once from the seed and skewed towards small ids, so
that a model first learns which ids are frequent and then which follows which. Now and then the
chain restarts anywhere, so that it cannot be caught in a short cycle.
"""

from __future__ import annotations

import numpy as np
import torch

from fp8lm.data.batches import SizedDataset
from fp8lm.data.conversations import ExampleFormat, MaskedTokens
from fp8lm.data.examples import SEQUENCES, Examples

MOCK_EXAMPLES = 256  # of each split
SUCCESSORS = 4
FOLLOW = (0.55, 0.25, 0.1, 0.05)
RESTART = 0.05


class MarkovChain:
    """The chain of a vocabulary and a seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        skewed = np.random.default_rng(seed).random((vocab_size, SUCCESSORS)) ** 3
        # A plain list: the chain is walked id by id, where numpy's scalars would be slow.
        self._followers = (vocab_size * skewed).astype(np.int64).ravel().tolist()

    def walk(self, rng: np.random.Generator, length: int, start: int | None = None) -> list[int]:
        """`length` ids from `start`, or from anywhere."""
        branches = rng.choice(SUCCESSORS + 1, size=length, p=(*FOLLOW, RESTART)).tolist()
        anywhere = rng.integers(self._vocab_size, size=length).tolist()
        follow, ids = self._followers, []
        token = anywhere[0] if start is None else start
        for branch, fresh in zip(branches, anywhere, strict=True):
            ids.append(token)
            token = fresh if branch == SUCCESSORS else follow[token * SUCCESSORS + branch]
        return ids


class MockDataset(SizedDataset):
    """Items like GPTDataset's, but for positions, which are not in them.

    Item i is a pure function of (vocabulary, seed, split, i).
    All splits follow the same chain, so what is learnt on one holds on another.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_length: int,
        seed: int,
        split: int,
        size: int,
        eod: int,
        eod_mask_loss: bool = False,
    ) -> None:
        self.vocab_size, self.seq_length, self.size = vocab_size, seq_length, size
        self.seed, self.split = seed, split
        self.eod, self.eod_mask_loss = eod, eod_mask_loss
        self._chain = MarkovChain(vocab_size, seed)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"mock sample {index} of {self.size}")
        text = torch.tensor(self._walk(index), dtype=torch.int64)
        tokens, labels = text[:-1], text[1:]
        loss_mask = torch.ones(self.seq_length)
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
        }

    def _walk(self, index: int) -> list[int]:
        """seq_length + 1 ids: one more than the tokens, for the last label."""
        rng = np.random.default_rng((self.seed, self.split, index))
        return self._chain.walk(rng, self.seq_length + 1)


def mock_examples(
    form: ExampleFormat, vocab_size: int, seq_length: int, seed: int, split: int, eod: int
) -> Examples:
    """Questions of ids anywhere, and answers that follow the chain from the question's last id.

    Lengths vary, and a document has at most half of `seq_length`. What is rejected is as long as
    what was chosen, and follows nothing. Questions begin with `eod`, and answers end with it.
    """
    chain, count = MarkovChain(vocab_size, seed), SEQUENCES[form]
    most = max(4, seq_length // (2 * count))  # tokens of a sequence
    sequences: list[MaskedTokens] = []
    for index in range(MOCK_EXAMPLES):
        rng = np.random.default_rng((seed, split, index))
        length = int(rng.integers(4, most + 1))
        asked = int(rng.integers(2, length - 1))
        question = [eod, *rng.integers(vocab_size, size=asked - 1).tolist()]
        answers = [chain.walk(rng, length - asked + 1, question[-1])[1:]]
        if count > 1:
            answers.append(rng.integers(vocab_size, size=length - asked).tolist())
        for answer in answers:
            mask = np.repeat(np.array([0, 1], np.uint8), [asked, length - asked])
            ids = np.array([*question, *answer[:-1], eod], np.int64)
            sequences.append(MaskedTokens(ids, mask))
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    return Examples("mock_data", form, lengths, sequences.__getitem__, lambda n: f"mock {n}")
