"""Tokenize JSON lines or plain text into Megatron's indexed format.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model \\
    --workers 2 --append-eod

Writes P_text_document.{bin,idx}, which Megatron reads too, and P_text_document.json, which names
the tokenizer so that training with another one is refused. Documents keep the order of the input.
Files named .jsonl or .json hold one JSON object a line; any other file is plain text and one
document, or one document a line with --split-lines.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from fp8lm.data.documents import check_inputs, read_records
from fp8lm.data.encode import EncodedDocument, EncodeSettings, encode_records
from fp8lm.data.tokenizer import TOKENIZER_TYPES, load_tokenizer
from fp8lm.errors import CommandParser, InputError, run_command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="corpus files, in order")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    add("--split-lines", action="store_true", help="plain text: each line is a document")
    add("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.{bin,idx,json}")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--tokenizer-model", metavar="PATH", help="model file or folder of the tokenizer")
    add("--vocab-size", type=int, help="NullTokenizer only: ids without the end of document")
    add("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    add("--append-eod", action="store_true", help="end every document with the eod token")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error("--json-keys names a key twice")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    files = check_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    # Imported here, not above: worker processes import this file, and need neither torch nor it.
    from fp8lm.data.indexed_writer import IndexedWriter, token_dtype

    dtype = token_dtype(tokenizer.vocab_size)
    settings = EncodeSettings(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_size,
        tuple(args.json_keys),
        args.append_eod,
        dtype.__name__,
    )
    began = time.perf_counter()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedWriter(f"{args.output_prefix}_{key}_document", dtype))
            for key in args.json_keys
        }
        records = read_records(files, args.split_lines)
        documents = stack.enter_context(closing(encode_records(records, settings, args.workers)))
        for document in with_progress(documents, files):
            for key, ids in document.ids.items():
                writers[key].add(ids)
        for key, writer in writers.items():
            if not writer.num_documents:
                raise InputError(f"the corpus is empty: no text in {key!r} of {names(files)}")
        for writer in writers.values():
            writer.publish({"tokenizer": tokenizer.identity, "append_eod": args.append_eod})
    seconds = time.perf_counter() - began
    if not args.append_eod:
        print("note: without --append-eod nothing tells a model where a document ends")
    for writer in writers.values():
        print(
            f"{writer.prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens, "
            f"{writer.num_tokens / seconds:,.0f} tokens/s"
        )


def with_progress(
    documents: Iterator[EncodedDocument], files: list[Path]
) -> Iterator[EncodedDocument]:
    """Pass the documents on, with a bar in bytes of input when stderr is a terminal."""
    total = sum(file.stat().st_size for file in files)
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=quiet) as bar:
        for document in documents:
            yield document
            bar.update(document.num_bytes)


def names(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")


if __name__ == "__main__":
    # A batch system's SIGTERM cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_command(main))
