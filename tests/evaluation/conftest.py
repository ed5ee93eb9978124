from __future__ import annotations

from tests.generate.conftest import checkpoint

__all__ = ["checkpoint"]
