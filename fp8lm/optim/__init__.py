"""Precision-decoupled AdamW, clipping and schedules."""

from fp8lm.optim.optimizer import AdamW, StatePrecision

__all__ = ["AdamW", "StatePrecision"]
