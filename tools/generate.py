"""Write text with a trained model.

python tools/generate.py --load runs/x/checkpoints --prompt "def " [--max-new-tokens 100]

Samples from the model as it was trained (FP8 weights stay FP8), with the tokenizer that is in the
checkpoint. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor, nn

from fp8lm.arguments import finite, number_type, path_text
from fp8lm.data.tokenizer import TOKENIZER_TYPES
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.training.builders import resolve_device
from fp8lm.training.restore import restore_model

MOST_SEED = 2**64 - 1
TOKENS_PER_GEMM = 16  # FP8 GEMMs take token counts that are multiples of this


def main(argv: list[str]) -> None:
    """Load, sample, print prompt and continuation."""
    options = parse_options(argv)
    check_prompt(options.prompt)
    device = resolve_device(options.device)
    restored = restore_model(options.load, device, options.tokenizer_model, options.tokenizer_type)
    for warning in restored.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    tokenizer = restored.tokenizer
    prompt = tokenizer.tokenize(options.prompt)
    if not prompt:
        raise InputError("--prompt has no tokens: give the text to continue")
    ids = sample(
        restored.model,
        prompt,
        options.max_new_tokens,
        window=restored.config.model.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        stop=tokenizer.eod,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    show(tokenizer.detokenize(ids))


def check_prompt(prompt: str) -> None:
    """`InputError` for one that is no text."""
    if not prompt:
        raise InputError("--prompt is empty: give the text to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("--prompt is not UTF-8 text") from None


def show(text: str) -> None:
    """Print `text`, with escapes for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--load", type=path_text, required=True, help="folder of checkpoints, or one of them"
    )
    parser.add_argument(
        "--tokenizer-model", type=path_text, help="not the checkpoint's own: a file or folder"
    )
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="its kind, if another")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=number_type(0), default=100)
    parser.add_argument("--temperature", type=finite, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-k", type=number_type(1), default=40)
    parser.add_argument("--seed", type=number_type(0, MOST_SEED), default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


@torch.no_grad()
def sample(
    model: nn.Module,
    ids: list[int],
    count: int,
    *,
    window: int,
    vocab_size: int,
    stop: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> list[int]:
    """`ids` followed by up to `count` sampled ones; ends before token `stop`.

    `window` is how many last tokens the model sees, `vocab_size` the unpadded one.
    """
    ids = list(ids)
    for _ in range(count):
        logits = next_logits(model, ids[-window:], window)[:vocab_size]
        token = choose(logits, temperature, top_k, generator)
        if token == stop:
            break
        ids.append(token)
    return ids


def next_logits(model: nn.Module, ids: list[int], window: int) -> Tensor:
    """Logits [V] (fp32, CPU) of the token after `ids`, of which there are at most `window`.

    Padded on the right to a number of tokens that FP8 GEMMs take; causal attention keeps that from
    mattering, except through the amax that the padding's activations share with the text's. Where
    the model has no positions for that, the text is given several times.
    """
    length = min(len(ids) + -len(ids) % TOKENS_PER_GEMM, window)
    copies = TOKENS_PER_GEMM // math.gcd(length, TOKENS_PER_GEMM)
    device = next(model.buffers()).device
    row = ids + [ids[-1]] * (length - len(ids))
    tokens = torch.tensor([row] * copies, device=device)
    return model(tokens)[len(ids) - 1, 0].float().cpu()


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id: the likeliest at temperature 0, else sampled from the `top_k` likeliest.

    Raises `InputError` for logits that are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are not fit for use")
    if temperature == 0:
        return int(logits.argmax())
    values, indices = logits.topk(min(top_k, len(logits)))
    # The largest becomes 0 first, and stays 0 however small the temperature is.
    scaled = ((values - values[0]).double() / temperature).float()
    probabilities = torch.softmax(scaled, dim=0)
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])


if __name__ == "__main__":
    sys.exit(run_command(main))
