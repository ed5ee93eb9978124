"""Write Megatron's indexed files with megatron-core's builder, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fp8lm.data.files import folder_aside
from fp8lm.data.sidecar import Sidecar
from fp8lm.runtime.errors import InputError, RunFailed
from fp8lm.runtime.quiet import quiet_megatron

with quiet_megatron():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def token_dtype(vocab_size: int) -> type[np.number]:
    """The narrowest dtype in which Megatron stores the ids of such a vocabulary."""
    return DType.optimal_dtype(vocab_size)


class IndexedWriter:
    """Collects documents aside; `publish` gives `prefix.{bin,json,idx}` their names.

    A context manager: leaving it without `publish` leaves nothing behind. `InputError` where the
    files may not be written, `RunFailed` where they cannot, as on a full disk.
    """

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.num_documents = self.num_tokens = 0
        self._digest = hashlib.sha256()
        self._range: tuple[int, int] | None = None

    def __enter__(self) -> IndexedWriter:
        self._aside = folder_aside(Path(self.prefix))
        self._part = str(self._aside.__enter__() / "part")
        self._builder = IndexedDatasetBuilder(self._part + ".bin", dtype=self.dtype)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # on a full disk what is left in the buffer cannot be written
            self._builder.data_file.close()
        self._aside.__exit__(kind, error, trace)

    def add(self, ids: np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append a document, of sequences of these `lengths` (default: one).

        One without ids is left out, as Megatron does.
        """
        if not len(ids):
            return
        with self._write_errors():
            self._builder.add_document(ids, [len(ids)] if lengths is None else list(lengths))
        self._digest.update(np.ascontiguousarray(ids, dtype=self.dtype).data)
        extremes = int(ids.min()), int(ids.max())
        low, high = self._range or extremes
        self._range = min(low, extremes[0]), max(high, extremes[1])
        self.num_documents += 1
        self.num_tokens += len(ids)

    def finish(self, facts: dict[str, Any]) -> None:
        """Complete the files under their temporary names, with `facts` in the sidecar."""
        with self._write_errors():
            self._builder.finalize(self._part + ".idx")
            low, high = self._range or (None, None)
            sidecar = Sidecar(
                **facts,
                documents=self.num_documents,
                tokens=self.num_tokens,
                min_id=low,
                max_id=high,
                bin_sha256=self._digest.hexdigest(),
                idx_sha256=hashlib.sha256(Path(self._part + ".idx").read_bytes()).hexdigest(),
            )
            text = sidecar.model_dump_json(indent=2, exclude_none=True)
            Path(self._part + ".json").write_text(text + "\n")

    def rename(self) -> None:
        """Give the finished files their names."""
        with self._write_errors():
            # An old index goes first and the new one comes last: nobody finds an index beside
            # another run's tokens.
            with suppress(FileNotFoundError):
                os.remove(self.prefix + ".idx")
            for suffix in (".bin", ".json", ".idx"):
                os.replace(self._part + suffix, self.prefix + suffix)

    def publish(self, facts: dict[str, Any]) -> None:
        """Finish and rename."""
        self.finish(facts)
        self.rename()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            kind = RunFailed if err.errno in NO_ROOM else InputError
            raise kind(f"cannot write {self.prefix}: {err.strerror or err}") from None
