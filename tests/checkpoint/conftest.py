"""A folder with one checkpoint."""

from __future__ import annotations

import pytest

from fp8lm.checkpoint import save_checkpoint
from tests.checkpoint.tensors import META, make_tensors, shards_of


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoint 100, and its tensors."""
    tensors = make_tensors()
    save_checkpoint(tmp_path, 100, shards_of(tensors), META)
    return tmp_path, tensors
