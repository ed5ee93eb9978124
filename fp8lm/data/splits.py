"""Which documents are for training, validation and test."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np

SPLITS = ("train", "valid", "test")


def split_edges(split: str) -> list[tuple[float, float]]:
    """Where train, valid and test begin and end in the documents, rounded as megatron-core does."""
    shares = np.array([float(share) for share in split.split(",")])
    edges = list(accumulate((shares / shares.sum()).tolist(), initial=0))
    edges += [edges[-1]] * (len(SPLITS) + 1 - len(edges))
    return list(pairwise(edges))


def document_ranges(split: str, num_documents: int) -> list[range]:
    """The numbers of the documents of train, valid and test."""
    return [
        range(round(begin * num_documents), round(end * num_documents))
        for begin, end in split_edges(split)
    ]
