"""Corpus files as streams of bytes, compressed or not, recognised by their first bytes.

gzip, bzip2, xz and Zstandard are read as they come, without a copy on disk and in bounded memory.
Archives, tables and other encodings of text are named for what they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8lm.runtime.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "a Parquet table",
    b"ARROW1\x00": "an Arrow table",
    b"\x04\x22\x4d\x18": "lz4, which is not read",
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x00\x00\xfe\xff": "UTF-32 text",
}
SKIPPABLE_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # may precede those of Zstandard
TAR = slice(257, 262)


class CorpusStream:
    """The content of a corpus file; `position` is how far its bytes on disk are read.

    A context manager. `InputError` for a file that cannot be read, a damaged archive, and content
    that is no text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw: io.BufferedReader | None = None

    def __enter__(self) -> CorpusStream:
        with self._errors():
            self._raw = open(self.path, "rb")
            try:
                self._content = _decompressed(self._raw)
                self._refuse_other_formats()
            except BaseException:
                self._raw.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._raw is not None:
            self._raw.close()

    @property
    def position(self) -> int:
        """0 for a pipe."""
        return self._raw.tell() if self._raw is not None and self._raw.seekable() else 0

    def peek(self) -> bytes:
        """Some of the next bytes, without taking them."""
        with self._errors():
            return self._content.peek(1 << 16)

    def line(self, limit: int) -> bytes:
        """The next line with its end, or `limit` bytes of a longer one; empty at the end."""
        with self._errors():
            return self._content.readline(limit)

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, fewer only at the end."""
        with self._errors():
            return self._content.read(limit)

    def _refuse_other_formats(self) -> None:
        head = self._content.peek(512)
        for magic, what in UNREADABLE.items():
            if head.startswith(magic):
                raise InputError(f"{self.path} is {what}: give JSON lines or text in UTF-8")
        if head[TAR] == b"ustar":
            raise InputError(f"{self.path} is a tar archive: unpack it and give its files")
        if head.startswith(BYTE_ORDER_MARK):
            self._content.read(len(BYTE_ORDER_MARK))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever the libraries raise, as one line."""
        try:
            yield
        except InputError:
            raise
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as err:
            raise InputError(f"{self.path} is damaged or incomplete: {err}") from None
        except OSError as err:
            # bz2's complaints are OSErrors without a number.
            what = f"cannot read {self.path}" if err.errno else f"{self.path} is damaged"
            raise InputError(f"{what}: {err.strerror or err}") from None
        except Exception as err:
            if type(err).__name__ != "ZstdError":  # of a package that is only imported if needed
                raise
            raise InputError(f"{self.path} is damaged: {err}") from None


class _Decompressed(io.RawIOBase):
    """One compressed stream after another, each whole.

    Unlike the libraries' own files, which end silently at a later stream whose start is damaged.
    Zeros between and after streams are padding.
    """

    def __init__(self, raw: io.BufferedReader, new_decoder: Callable[[], Any]) -> None:
        self._raw, self._new_decoder = raw, new_decoder
        self._decoder, self._given = new_decoder(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        while True:
            if self._decoder.eof and not self._next_stream():
                return 0
            if self._decoder.needs_input and not self._given:
                self._given = self._raw.read(1 << 17)
                if not self._given:
                    raise EOFError("it ends in the middle")
            data = self._decoder.decompress(self._given, len(room))
            self._given = b""
            if data:
                room[: len(data)] = data
                return len(data)

    def _next_stream(self) -> bool:
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest:
            if not (block := self._raw.read(1 << 17)):
                return False
            rest = block.lstrip(b"\0")
        self._decoder, self._given = self._new_decoder(), rest
        return True


def _decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    """The content, decompressed if it is compressed."""
    head = raw.peek(16)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if head.startswith(b"BZh"):
        decoder: Callable[[], Any] = bz2.BZ2Decompressor
    elif head.startswith(b"\xfd7zXZ\x00"):
        decoder = lzma.LZMADecompressor
    elif head.startswith(b"\x28\xb5\x2f\xfd") or SKIPPABLE_FRAME.match(head):
        decoder = _zstandard_decoder()
    else:
        return raw
    return io.BufferedReader(_Decompressed(raw, decoder), 1 << 20)


def _zstandard_decoder() -> Callable[[], Any]:
    try:
        from backports import zstd
    except ImportError:
        raise InputError(
            "Zstandard files need backports.zstd: pip install backports.zstd"
        ) from None
    # Windows as wide as the format allows: archives made with --long need them.
    option = zstd.DecompressionParameter.window_log_max
    return partial(zstd.ZstdDecompressor, options={option: option.bounds()[1]})
