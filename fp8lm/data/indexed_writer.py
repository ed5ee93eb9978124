"""Write Megatron's indexed files with megatron-core's builder, whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from fp8lm.data.files import folder_aside
from fp8lm.quiet import quiet_megatron

with quiet_megatron():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def token_dtype(vocab_size: int) -> type[np.number]:
    """The narrowest dtype in which Megatron stores the ids of such a vocabulary."""
    return DType.optimal_dtype(vocab_size)


class IndexedWriter:
    """Collects documents aside; `publish` gives `prefix.{bin,json,idx}` their names.

    A context manager: leaving it without `publish` leaves nothing behind.
    """

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.num_documents = self.num_tokens = 0

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
        self._builder.data_file.close()
        self._aside.__exit__(kind, error, trace)

    def add(self, ids: np.ndarray) -> None:
        """Append a document; one without ids is left out, as Megatron does."""
        if not len(ids):
            return
        self._builder.add_document(ids, [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)

    def publish(self, sidecar: dict) -> None:
        """Finish the index, and move the files into place with `sidecar` as `prefix.json`."""
        self._builder.finalize(self._part + ".idx")
        counts = {"documents": self.num_documents, "tokens": self.num_tokens}
        Path(self._part + ".json").write_text(json.dumps(sidecar | counts, indent=2) + "\n")
        # An old index goes first and the new one comes last: nobody finds an index beside
        # another run's tokens.
        with suppress(FileNotFoundError):
            os.remove(self.prefix + ".idx")
        for suffix in (".bin", ".json", ".idx"):
            os.replace(self._part + suffix, self.prefix + suffix)
