"""The export of a checkpoint, as `transformers` reads it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp8lm.checkpoint import open_checkpoint
from fp8lm.convert.hf_export import export_model, plan_export


def exported(checkpoint, folder):
    """The FP32 export of `checkpoint` in `folder`: a model in evaluation mode."""
    plan = plan_export(open_checkpoint(checkpoint), "fp32")
    export_model(plan, folder, 10**9, {}, lambda nbytes: None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    """The tokenizer beside it."""
    return AutoTokenizer.from_pretrained(folder)
