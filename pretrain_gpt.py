"""Pretrain a GPT model in FP8.

python pretrain_gpt.py [--config] configs/gpt_tiny.yaml [section.key=value ...]
"""

from __future__ import annotations

from fp8lm.pretrain import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
