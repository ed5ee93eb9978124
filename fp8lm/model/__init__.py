"""The GPT model: math that names no process and no format."""

from fp8lm.model.gpt import GPTModel

__all__ = ["GPTModel"]
