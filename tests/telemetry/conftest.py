"""Runs of a tiny model, as the tests of training have them."""

from __future__ import annotations

from tests.training.conftest import folders, read_metrics, tiny_config, train_run

__all__ = ["folders", "read_metrics", "tiny_config", "train_run"]
