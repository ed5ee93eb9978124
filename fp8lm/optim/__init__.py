"""Precision-decoupled AdamW, clipping and schedules."""

from fp8lm.optim.optimizer import AdamW
from fp8lm.optim.states import StatePrecision

__all__ = ["AdamW", "StatePrecision"]
