"""Where the numbers of a run go: JSON lines and TensorBoard for scalars, one file for small arrays.

A record belongs to a step, counted in updates that are done: the record of step 10 holds the loss of the tenth batch and the
evaluation after it, and the checkpoint of step 10 follows it. A run that is continued forgets the records after its
checkpoint, so that each step stands exactly once.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

JSON_LINES, ARRAYS = "metrics.jsonl", "arrays.npz"


class Writer(Protocol):
    """A destination of scalars. Implement it to log elsewhere."""

    def start(self, step: int) -> None:
        """Forgets all records after `step`; called before the first record, and when the run goes back to `step`."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the record of `step`; steps grow."""

    def flush(self) -> None:
        """Returns when all records will survive the end of the process."""

    def close(self) -> None:
        """No more records follow."""


class JsonLines:
    """`metrics.jsonl`: a JSON object for each step. Numbers that are not finite become null, which JSON has."""

    def __init__(self, directory: Path):
        self._path = directory / JSON_LINES
        self._file: Any = None

    def start(self, step: int) -> None:
        kept = [record for record in read_records(self._path.parent) if record["step"] <= step]
        self.close()
        replace(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = self._path.open("a")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`; TensorBoard hides what a continued run overwrites.

    Events are written by the caller's thread, one for each step: a full disk is an exception there, not the end of a thread.
    """

    def __init__(self, directory: Path):
        self._directory = directory / "tensorboard"
        self._file: Any = None

    def start(self, step: int) -> None:
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = RecordWriter(str(self._directory / f"events.out.tfevents.{time.time_ns()}"))
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=summary_pb2.Summary(value=values))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, **content: Any) -> None:
        self._file.write(event_pb2.Event(wall_time=time.time(), **content).SerializeToString())


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in the order of steps; empty if there is none.

    A line that the end of the process cut short is left out: its step was not saved, so it will be done again.
    """
    path = directory / JSON_LINES
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_arrays(directory: Path) -> dict[str, np.ndarray]:
    """`arrays.npz`: the array-valued metrics of the last step written; empty if there are none."""
    path = directory / ARRAYS
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays under any names (`np.savez` keeps some for itself), at one stroke."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    replace(path, content.getvalue())


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that at every moment it holds either the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
