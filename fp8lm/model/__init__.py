"""The GPT model as plain math: no process groups, no formats."""

from fp8lm.model.gpt import GPTModel

__all__ = ["GPTModel"]
