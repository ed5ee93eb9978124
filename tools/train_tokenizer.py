"""Train a SentencePiece tokenizer on JSON lines or plain text.

python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-prefix data/tok

Writes PREFIX.model: ids 0 <unk>, 1 <s>, 2 </s> (the end of a document), then 256 bytes, so that any
text can be written, then the learnt pieces. White space is kept as it is: text comes back exactly.
The same input gives the same model, whatever the machine.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from fp8lm.arguments import finite, path_text
from fp8lm.data.documents import (
    BadDocument,
    SkippedDocuments,
    add_reading_arguments,
    check_inputs,
    parse_record,
    read_records,
)
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

# SentencePiece leaves out sentences beyond 4192 bytes without a word; a character has at most 4.
MAX_CHARACTERS = 1000
FIXED_PIECES = 3 + 256


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        type=path_text,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines or plain text",
    )
    add("--json-key", default="text", metavar="KEY", help="key of the text (default: text)")
    add("--vocab-size", type=int, required=True, help="pieces, the fixed ones included")
    add_reading_arguments(parser)
    add("--model-type", choices=("bpe", "unigram"), default="bpe")
    add(
        "--output-prefix",
        type=path_text,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.model",
    )
    add("--max-mb", type=finite, default=256, help="read at most so much text (default: 256)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.vocab_size <= FIXED_PIECES:
        raise InputError(
            f"--vocab-size {args.vocab_size} is too small: {FIXED_PIECES} pieces are fixed"
        )
    files = check_inputs(args.input)
    skipped = SkippedDocuments() if args.on_bad_line == "skip" else None
    texts = read_texts(files, args.json_key, args.input_format, skipped)
    pieces = list(cut_pieces(texts, int(args.max_mb * 1e6)))
    if skipped is not None and skipped.count:
        print(f"note: {skipped}", file=sys.stderr)
    if not pieces:
        raise InputError(f"the corpus is empty: no text in {', '.join(args.input)}")
    output = Path(f"{args.output_prefix}.model")
    write_aside(output, train(pieces, args.vocab_size, args.model_type))
    characters = sum(map(len, pieces))
    print(f"{output}: {args.vocab_size} pieces from {characters} characters of text")


def read_texts(
    files: list[Path], key: str, input_format: str, skipped: SkippedDocuments | None
) -> Iterator[str]:
    """Every document's text; with `skipped` bad ones are counted there, not raised."""
    for record in read_records(files, input_format=input_format):
        try:
            yield parse_record(record, [key])[key]
        except BadDocument as fault:
            if skipped is None:
                raise
            skipped.add(str(fault))


def cut_pieces(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """The corpus in pieces that SentencePiece takes: lines, long ones cut."""
    left = max_characters
    for text in texts:
        for line in text.splitlines():
            for piece in cut(line):
                left -= len(piece)
                if left < 0:
                    print(f"reading stops at --max-mb {max_characters / 1e6:g}")
                    return
                yield piece


def cut(line: str) -> Iterator[str]:
    """A line in parts of at most MAX_CHARACTERS, cut before a space where there is one."""
    while len(line) > MAX_CHARACTERS:
        space = line.rfind(" ", 1, MAX_CHARACTERS)
        end = space if space > 0 else MAX_CHARACTERS
        yield line[:end]
        line = line[end:]
    if line:
        yield line


def train(pieces: list[str], vocab_size: int, model_type: str) -> bytes:
    """The trained model's bytes; `InputError` when the vocabulary does not fit the corpus."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            # Fixed, not the machine's: unigram's sums depend on how they are shared out.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as err:
        raise InputError(explain(str(err), vocab_size)) from None
    return model.getvalue()


def explain(message: str, vocab_size: int) -> str:
    """SentencePiece's message about the vocabulary, as what to change."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for this corpus: at most {found[1]}, "
            "or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small for this corpus: at least {found[1]}"
    return f"SentencePiece could not train: {message}"


if __name__ == "__main__":
    sys.exit(run_command(main))
