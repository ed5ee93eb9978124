"""Silences megatron-core's warnings and log lines while it is called."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Silence warnings, and megatron's log records below ERROR, inside the `with` block.

    Importing megatron-core without TransformerEngine and apex warns four times about fallbacks
    that this project never uses. The filters are restored on leaving the block.
    """
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
