"""Writing safetensors files whose tensors arrive one at a time, from several threads and processes.

A file is made at its full size under a temporary name, header first, so that whoever holds a tensor writes it where it belongs; it gets
its name when all are there. What carries the name of a file is therefore complete.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.safetensors_io import DTYPES, INDEX, SINGLE, SafetensorsFile

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PARTIAL = ".partial"


class TensorSpec(NamedTuple):
    """What a stored tensor will be."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A file to be: its name, and its tensors in their order."""

    path: Path
    tensors: Mapping[str, TensorSpec]

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    @functools.cached_property
    def header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in self.tensors.items():
            entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
            end += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text.ljust(-(-len(text) // 8) * 8)  # the values begin at a multiple of eight bytes

    @property
    def size(self) -> int:
        return 8 + len(self.header) + sum(spec.nbytes for spec in self.tensors.values())

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins, in bytes from the start of the file."""
        found, position = {}, 8 + len(self.header)
        for name, spec in self.tensors.items():
            found[name] = position
            position += spec.nbytes
        return found

    def is_complete(self) -> bool:
        """Whether a file of this name stands there already.

        Raises:
          CheckpointError: it does, but holds other tensors.
        """
        if not self.path.exists():
            return False
        there = SafetensorsFile(self.path)
        specs = {name: TensorSpec(DTYPES[info.dtype], info.shape) for name, info in there.items()}
        if specs != dict(self.tensors):
            raise CheckpointError(f"{self.path} exists and holds other tensors; choose an empty directory, or remove the file.")
        return True

    def create(self) -> None:
        """Makes the file under its temporary name: header, and room for the values."""
        header = self.header
        with self.partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(self.size)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor; safe to call from several threads.

        Raises:
          CheckpointError: the values are not what the header says, or the disk is full.
        """
        spec = self.tensors[name]
        if values.dtype != spec.dtype or values.shape != spec.shape:
            raise CheckpointError(f"{name} is {values.dtype}{list(values.shape)}, expected {spec.dtype}{list(spec.shape)}.")
        content = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            descriptor = os.open(self.partial, os.O_WRONLY)
            try:
                position = self.offsets[name]
                while content:
                    written = os.pwrite(descriptor, content, position)
                    content, position = content[written:], position + written
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.partial} cannot be written ({error.strerror}); free some space, then start again.") from error

    def finish(self) -> None:
        """Gives the file its name, once every tensor is written."""
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)


class TensorWriter:
    """Takes the tensors of several files as they come, from any thread, and gives each file its name when it has all of its own.

    Args:
      files: those that are to be made here; complete ones are left alone.
      progress: called with the bytes written and the bytes to write, after every tensor.
    """

    def __init__(self, files: Sequence[OutputFile], progress: Callable[[int, int], None]):
        left = [file for file in files if not file.is_complete()]
        self._file_of = {name: file for file in left for name in file.tensors}
        self._left = Counter({file.path: len(file.tensors) for file in left})
        self._total = sum(spec.nbytes for file in left for spec in file.tensors.values())
        self._done, self._lock, self._progress = 0, threading.Lock(), progress

    def __contains__(self, name: str) -> bool:
        """Whether the tensor is to be written."""
        return name in self._file_of

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes a tensor, unless it is not to be written.

        Raises:
          CheckpointError: the values are not what the header says, or the disk is full.
        """
        if (file := self._file_of.get(name)) is None:
            return
        file.write(name, values)
        with self._lock:
            self._left[file.path] -= 1
            self._done += values.nbytes
            is_last = self._left[file.path] == 0
            self._progress(self._done, self._total)
        if is_last:
            file.finish()


def split_into_files(directory: Path, tensors: Mapping[str, TensorSpec], max_bytes: int) -> list[OutputFile]:
    """Deals tensors, in their order, to files of at most `max_bytes` (or of a single tensor), named as in the released layout."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + spec.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    if len(groups) == 1:
        return [OutputFile(directory / SINGLE, groups[0])]
    stem = SINGLE.removesuffix(".safetensors")
    return [OutputFile(directory / f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_index(directory: Path, files: Sequence[OutputFile]) -> None:
    """The index of a checkpoint of several files; written last, so that a directory with an index is complete."""
    if len(files) == 1:
        return
    where = {name: file.path.name for file in files for name in file.tensors}
    total = sum(spec.nbytes for file in files for spec in file.tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that the file is complete or absent."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def check_space(directory: Path, files: Sequence[OutputFile]) -> None:
    """Raises `CheckpointError` where the disk has less room than the files that are not there yet need."""
    needed = sum(file.size for file in files if not file.path.exists())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"no space for the checkpoint in {directory}: it needs {needed:,} more bytes and {free:,} are free; free some space, or choose "
            "another directory."
        )
