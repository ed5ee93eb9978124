"""Write text with a trained model.

python tools/generate.py --load runs/x/checkpoints --prompt "def " [--max-new-tokens 100]
python tools/generate.py --load runs/x/checkpoints --prompts-file prompts.txt --json out.jsonl
python tools/generate.py --load runs/x/checkpoints --chat
torchrun --nproc-per-node 2 tools/generate.py --tensor-model-parallel-size 2 --load ... --prompt ...

Samples from the model as it was trained (FP8 weights stay FP8), with the tokenizer that is in the
checkpoint. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from tqdm import tqdm

from fp8lm.arguments import as_path, finite, number_type
from fp8lm.checkpoint.collectives import all_or_error, from_all, on_main
from fp8lm.data.files import write_aside
from fp8lm.generate.chat import Chat
from fp8lm.generate.decoding import Completion, Decoding, check_length, complete
from fp8lm.generate.loading import add_model_arguments, model_of_options
from fp8lm.generate.model import KV_CACHE_DTYPES, InferenceModel
from fp8lm.generate.prompts import as_json, is_text, read_prompts
from fp8lm.generate.sampling import Sampling
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.runtime.streams import complain

MOST_SEED = 2**64 - 1
STDOUT = "-"
CLEAR, EXIT = ("/clear", "/reset"), ("/exit", "/quit")


def main(argv: list[str]) -> None:
    """Load, generate, print."""
    options = parse_options(argv)
    prompts = [] if options.chat else texts(options)
    with model_of_options(options) as model:
        if options.chat:
            converse(model, decoding(options), options.system)
        else:
            generate(model, prompts, options)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="text to continue; may be given repeatedly")
    what.add_argument(
        "--prompts-file", type=as_path, help='a prompt per line, or JSON lines with "prompt"'
    )
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="print the text of one prompt as it grows")
    add(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="a JSON line for each prompt, with the tokens, on stdout or in a file",
    )
    options = parser.parse_args(argv)
    if options.stream and (options.json or options.prompts_file or len(options.prompt or []) > 1):
        parser.error("--stream is for one --prompt, without --json")
    if options.system is not None and not options.chat:
        parser.error("--system is for --chat")
    return options


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen and computed."""
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=number_type(0), default=100)
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--temperature", type=finite, default=0.8, help="0: as --greedy (default: 0.8)")
    add("--top-k", type=number_type(1), default=40, help="of the k likeliest (default: 40)")
    add("--top-p", type=share, default=1.0, help="of the likeliest that add up to p (default: 1)")
    add("--repetition-penalty", type=positive, default=1.0, help="above 1: fewer tokens again")
    add("--seed", type=number_type(0, MOST_SEED), default=0)
    add("--stop", action="append", default=[], help="text that ends generation; repeatable")
    add("--ignore-eod", action="store_true", help="go on after the end of a document")
    add("--no-cache", action="store_true", help="read all tokens again for each: slow, the same")
    add(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="auto: as the model computes; fp8: E4M3 with a scale per token and head",
    )
    add("--batch-size", type=number_type(1), default=16, help="prompts at once (default: 16)")
    add("--system", help="what --chat tells the model before the conversation")


def share(text: str) -> float:
    """A number above 0 up to 1."""
    value = finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = finite(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def decoding(options: argparse.Namespace) -> Decoding:
    """What the options of `add_sampling_arguments` say."""
    if "" in options.stop:
        raise InputError("--stop is empty: give the text to stop at")
    temperature = 0.0 if options.greedy else options.temperature
    sampling = Sampling(
        temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed
    )
    return Decoding(
        sampling,
        options.max_new_tokens,
        tuple(options.stop),
        options.ignore_eod,
        not options.no_cache,
        options.kv_cache_dtype,
    )


def texts(options: argparse.Namespace) -> list[str]:
    """The prompts; `InputError` for one that is no text."""
    if options.prompts_file is not None:
        return read_prompts(options.prompts_file)
    for prompt in options.prompt:
        if not prompt:
            raise InputError("--prompt is empty: give the text to continue")
        if not is_text(prompt):
            raise InputError("--prompt is not UTF-8 text")
    return options.prompt


def generate(model: InferenceModel, prompts: list[str], options: argparse.Namespace) -> None:
    """Continue all `prompts`, shared between replicas, and write what comes of it."""
    ids = all_or_error(model.groups.world, lambda: tokenized(model, prompts))
    is_main, wanted = model.groups.is_main, decoding(options)
    on_text: Callable[[str], None] | None = None
    if options.stream and is_main:
        write(prompts[0])
        on_text = write
    size, replicas = options.batch_size, model.groups.data_parallel.size()
    starts = range(0, len(ids), size)[model.groups.data_parallel.rank() :: replicas]
    own: dict[int, Completion] = {}
    bar = tqdm(starts, disable=None if is_main and len(starts) > 1 else True, unit="batch")
    for start in bar:
        batch = ids[start : start + size]
        done = complete(model, batch, wanted, first_number=start, on_text=on_text)
        own |= dict(enumerate(done, start))
    found = {
        number: done for rank in from_all(model.groups.world, own) for number, done in rank.items()
    }
    if not is_main:
        return
    if options.stream:
        write("\n")
    else:
        report([found[number] for number in range(len(ids))], prompts, options.json)


def tokenized(model: InferenceModel, prompts: list[str]) -> list[list[int]]:
    """Token ids of `prompts`, all of which fit into the context."""
    ids = [model.tokenizer.tokenize(prompt) for prompt in prompts]
    for number, tokens in enumerate(ids, 1):
        try:
            check_length(tokens, model.context_length)
        except InputError as error:
            raise InputError(f"prompt {number}: {error}" if len(ids) > 1 else str(error)) from None
    return ids


def report(completions: list[Completion], prompts: list[str], target: str | None) -> None:
    """Print the texts, or write JSON lines to `target`."""
    if target is None:
        for number, done in enumerate(completions):
            write(f"{'-' * 20}\n" * bool(number) + done.whole + "\n")
        return
    both = zip(completions, prompts, strict=True)
    lines = "".join(json.dumps(as_json(done, prompt)) + "\n" for done, prompt in both)
    if target == STDOUT:
        write(lines)
    else:
        write_aside(as_path(target), lines)


def converse(model: InferenceModel, wanted: Decoding, system: str | None) -> None:
    """Answer what is typed until it ends; rank 0 reads and writes."""
    group, is_main = model.groups.world, model.groups.is_main
    chat = Chat(model, wanted, system)
    if is_main:
        complain(f"{CLEAR[0]} begins anew, {EXIT[0]} or Ctrl-D ends")
    while (text := on_main(group, typed)) is not None:
        if text in CLEAR:
            chat.clear()
            continue
        try:
            chat.answer(text, write if is_main else None)
        except InputError as error:  # of all ranks alike
            if is_main:
                complain(f"error: {error}")
        if is_main:
            write("\n")


def typed() -> str | None:
    """The next line that is not blank; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        if line.strip():
            return None if line.strip() in EXIT else line.strip()


def write(text: str) -> None:
    """Print `text` as it is, with escapes for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


if __name__ == "__main__":
    exit_with(main)
