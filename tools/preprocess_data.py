"""Tokenize JSON lines or plain text into Megatron's indexed format.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model \\
    --workers 2 --append-eod

Writes P_text_document.{bin,idx}, which Megatron reads too, and P_text_document.json, which says how
they were made, so that training with another tokenizer is refused. Documents keep the order of the
input. It may be JSON lines, or plain text, which is one document a file, or one a line with
--split-lines; compressed with gzip, bzip2, xz or Zstandard, or not.

--format chat and --format preference read examples for train.objective sft and dpo, JSON lines of
conversations or of preferences, and write P_chat_document or P_preference_document, and which
tokens are answers in P_chat_mask or P_preference_mask.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fp8lm.arguments import instead, path_text
from fp8lm.data.chat import ChatTemplate
from fp8lm.data.documents import (
    SkippedDocuments,
    add_reading_arguments,
    check_inputs,
    read_records,
)
from fp8lm.data.encode import MASK, EncodedDocument, EncodeSettings, encode_records
from fp8lm.data.examples import SEQUENCES, mask_prefix
from fp8lm.data.tokenizer import TOKENIZER_TYPES, Tokenizer, load_tokenizer
from fp8lm.runtime.errors import CommandParser, InputError, run_command

if TYPE_CHECKING:
    from fp8lm.data.indexed_writer import IndexedWriter

OF_MEGATRON = ("--vocab-file", "--merge-file")


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
        help="corpus files, in order",
    )
    add(
        "--format",
        choices=("text", *SEQUENCES),
        default="text",
        help="text (default); chat: conversations; preference: pairs of answers",
    )
    add(
        "--chat-template",
        type=path_text,
        metavar="FILE",
        help="Jinja file that renders messages (default: the tokenizer's own)",
    )
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    add("--split-lines", action="store_true", help="plain text: each line is a document")
    add_reading_arguments(parser)
    add(
        "--output-prefix",
        type=path_text,
        required=True,
        metavar="P",
        help="writes P_KEY_document.{bin,idx,json}",
    )
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add(
        "--tokenizer-model",
        type=path_text,
        metavar="PATH",
        help="model file or folder of the tokenizer",
    )
    add("--vocab-size", type=int, help="NullTokenizer only: ids without the end of document")
    folder = "--tokenizer-model FOLDER, with vocab.json and merges.txt in it"
    add(*OF_MEGATRON, type=instead(folder), help=argparse.SUPPRESS)
    add("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    add("--append-eod", action="store_true", help="end every document with the eod token")
    add("--prepend-bos", action="store_true", help="begin every document with the bos token")
    add(
        "--parse-special-tokens",
        action="store_true",
        help="control tokens such as </s> in the text become their ids (default: plain text)",
    )
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: CommandParser) -> None:
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error("--json-keys names a key twice")
    _check_format(args, parser)
    if args.parse_special_tokens and args.tokenizer_type == "NullTokenizer":
        parser.error("--parse-special-tokens: a NullTokenizer has no control tokens")


def _check_format(args: argparse.Namespace, parser: CommandParser) -> None:
    """Examples say themselves where they end, and which of their tokens are control tokens."""
    if args.format == "text":
        if args.chat_template is not None:
            parser.error("--chat-template is for --format chat or preference")
        return
    of_text = {
        "--json-keys": args.json_keys != ["text"],
        "--split-lines": args.split_lines,
        "--append-eod": args.append_eod,
        "--prepend-bos": args.prepend_bos,
        "--parse-special-tokens": args.parse_special_tokens,
    }
    if given := [option for option, value in of_text.items() if value]:
        parser.error(f"{given[0]} is for --format text, not {args.format}")
    args.input_format = "jsonl"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    files = check_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    if args.prepend_bos and tokenizer.bos is None:
        raise InputError(
            f"--prepend-bos: {args.tokenizer_model or args.tokenizer_type} has no token for the "
            "beginning of a document"
        )
    # Imported here, not above: worker processes import this file, and need neither torch nor it.
    from fp8lm.data.indexed_writer import IndexedWriter, token_dtype

    template = template_of(args, tokenizer)
    began, skipped = time.perf_counter(), SkippedDocuments()
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedWriter(prefix, np.uint8 if key == MASK else dtype))
            for key, prefix in prefixes_of(args).items()
        }
        encode(args, files, writers, skipped, dtype.__name__, template)
        for writer in writers.values():
            writer.finish(facts_for_sidecar(args, tokenizer, template))
        for writer in writers.values():
            writer.rename()
    seconds = time.perf_counter() - began
    if not args.append_eod and args.format == "text":
        print("note: without --append-eod nothing tells a model where a document ends")
    if skipped.count:
        print(f"note: {skipped}", file=sys.stderr)
    for writer in writers.values():
        print(
            f"{writer.prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens, "
            f"{writer.num_tokens / seconds:,.0f} tokens/s"
        )


def prefixes_of(args: argparse.Namespace) -> dict[str, str]:
    """What is written where, by the key of the documents."""
    if args.format == "text":
        return {key: f"{args.output_prefix}_{key}_document" for key in args.json_keys}
    prefix = f"{args.output_prefix}_{args.format}_document"
    return {args.format: prefix, MASK: mask_prefix(prefix)}


def template_of(args: argparse.Namespace, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What renders messages, if they have a template."""
    if args.chat_template is not None:
        return ChatTemplate.read(args.chat_template, tokenizer)
    return None if args.format == "text" else ChatTemplate.of(tokenizer)


def encode(
    args: argparse.Namespace,
    files: list[Path],
    writers: dict[str, IndexedWriter],
    skipped: SkippedDocuments,
    dtype: str,
    template: ChatTemplate | None,
) -> None:
    """Tokenize all documents into the writers, by key; `InputError` if one gets nothing."""
    settings = EncodeSettings(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_size,
        tuple(args.json_keys),
        args.append_eod,
        dtype,
        args.prepend_bos,
        args.parse_special_tokens,
        skip_bad=args.on_bad_line == "skip",
        format=args.format,
        template=template,
    )
    records = read_records(files, args.split_lines, args.input_format)
    with closing(encode_records(records, settings, args.workers)) as documents:
        for document in with_progress(documents, files):
            if document.fault is not None:
                skipped.add(document.fault)
            for key, ids in document.ids.items():
                writers[key].add(ids, document.lengths)
    for key, writer in writers.items():
        if not writer.num_documents:
            why = f": {skipped}" if skipped.count else ""
            what = f"text in {key!r}" if args.format == "text" else "examples"
            raise InputError(f"the corpus is empty: no {what} of {names(files)}{why}")


def facts_for_sidecar(
    args: argparse.Namespace, tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, object]:
    """What is recorded of how the files were made."""
    return {
        "tokenizer": tokenizer.identity,
        "append_eod": args.append_eod,
        "prepend_bos": args.prepend_bos,
        "bos": tokenizer.bos if args.prepend_bos else None,
        "parse_special_tokens": args.parse_special_tokens,
        "format": args.format,
        "chat_template": None if template is None else template.source,
    }


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
