"""TensorBoard's event file, written in the caller's thread.

`SummaryWriter` writes in a thread of its own, which answers a full disk with a traceback on stderr
before the caller hears of it. Here an error arrives where it happened.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.runtime.files import open_to_append


class TensorBoard:
    """Scalars and texts in `folder`; what a former run reported after `first_iteration` is hidden.

    A run that starts anew (0) hides all of it. Raises OSError where it cannot write.
    """

    def __init__(self, folder: Path, first_iteration: int, texts: Mapping[str, str]) -> None:
        # Imported here: many runs do without.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open_to_append(folder / name))
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        # An evaluation at `first_iteration` belongs to the former run, unless there is none.
        self._hide_from(first_iteration + 1 if first_iteration else 0)
        for tag, text in texts.items():
            self._write_text(tag, text, first_iteration)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Write scalars of one iteration to disk."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write_summary(Summary(value=scalars), iteration)

    def rewind(self, iteration: int) -> None:
        """Hide what was reported after `iteration`."""
        self._hide_from(iteration + 1)

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        self._records.close()

    def _hide_from(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        start = SessionLog(status=SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=step, session_log=start))

    def _write_text(self, tag: str, text: str, iteration: int) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        block = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown: as it stands
        self._write_summary(text_summary(tag, block), iteration)

    def _write_summary(self, summary: Any, iteration: int) -> None:
        self._write(self._event(wall_time=time.time(), step=iteration, summary=summary))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
