"""Silences megatron-core, and what it imports, while it is called."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Silence warnings, and megatron's log records below ERROR, inside the `with` block.

    Importing megatron-core without TransformerEngine and apex warns four times about fallbacks
    that this project never uses, and with PyTorch for CUDA on a machine without a GPU once about
    that. The filters are restored on leaving the block.
    """
    loggers = [logging.getLogger(name) for name in ("megatron", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
