"""Reading safetensors files: single ones and the sharded layout with an index.

The format is 8 bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the values, little-endian and
row-major. Files are memory-mapped, so that reading a slice of a tensor reads the pages of that slice only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from interns1pro_jax.checkpoint.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile(Mapping[str, TensorInfo]):
    """One memory-mapped file: a mapping from tensor names to their `TensorInfo`.

    Raises:
      CheckpointError: the file cannot be read, its header is damaged, or the values do not fill it exactly.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = self.path.stat().st_size
                if size < 8:
                    raise self._error(f"has {size} bytes, too few for a header; it is truncated, fetch it again")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or error}") from error
        length = int.from_bytes(self._bytes[:8], "little")
        if length > _MAX_HEADER:
            raise self._error(
                f"declares a header of {length} bytes, above the limit of {_MAX_HEADER}; it is no safetensors file, or damaged"
            )
        if 8 + length > size:
            raise self._error(
                f"declares a header of {length} bytes, but has only {size - 8} after the length; it is truncated, fetch it again"
            )
        self._infos = self._parse(self._bytes[8 : 8 + length], 8 + length, size)
        self._bytes.madvise(mmap.MADV_DONTNEED)  # with the header's pages come those around them

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """A copy of tensor `name`, or of the slices `index` of it (their bounds are indices of elements). Of the file, only their pages are
        read, and none stays resident."""
        info = self._infos[name]
        if index is None or all((part.start, part.stop) == (0, size) for part, size in zip(index[1:], info.shape[1:], strict=True)):
            return self._read_contiguous(info, index[0] if index else None)
        values = np.frombuffer(self._bytes, DTYPES[info.dtype], math.prod(info.shape), info.offset).reshape(info.shape)
        copy = np.array(values if index is None else values[tuple(index)], order="C")
        if info.nbytes:
            first_page = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, first_page, info.offset + info.nbytes - first_page)
        return copy

    def _read_contiguous(self, info: TensorInfo, first: slice | None) -> np.ndarray:
        """Entries `first` of a tensor's first axis (all of it for None). One request costs far less than a page fault for each page."""
        shape, row = info.shape, info.nbytes // max(math.prod(info.shape[:1]), 1)
        begin = info.offset
        if first is not None:
            shape, begin = (first.stop - first.start, *shape[1:]), begin + first.start * row
        result = np.empty(shape, DTYPES[info.dtype])
        content = memoryview(result.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            while content:
                if not (count := file.readinto(content)):
                    raise self._error("became shorter while it was read")
                content = content[count:]
        return result

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}.")

    def _parse(self, header: bytes, start: int, size: int) -> dict[str, TensorInfo]:
        try:
            content = json.loads(header, object_pairs_hook=self._unique)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a header that is not JSON ({error}); it is no safetensors file, or damaged") from error
        if not isinstance(content, dict):
            raise self._error("has a header that is not a JSON object; it is no safetensors file, or damaged")
        content.pop("__metadata__", None)
        spans: dict[str, tuple[int, int]] = {}
        infos: dict[str, TensorInfo] = {}
        for name, entry in content.items():
            infos[name], spans[name] = self._entry(name, entry, start, size)
        position = start
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != position:
                problem = "overlaps the tensor before it" if begin < position else f"leaves {begin - position} bytes before it unused"
                raise self._error(f"is damaged: tensor {name!r} {problem} (data_offsets {[begin - start, end - start]})")
            position = end
        if position != size:
            raise self._error(f"is damaged: {size - position} bytes after the last tensor belong to none")
        return infos

    def _entry(self, name: str, entry: Any, start: int, size: int) -> tuple[TensorInfo, tuple[int, int]]:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self._error(f"is damaged: tensor {name!r} needs dtype, shape and data_offsets, but its entry is {entry!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._error(f"stores tensor {name!r} as {dtype!r}, which is not supported; known are {', '.join(DTYPES)}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise self._error(f"is damaged: tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
        info = TensorInfo(dtype, tuple(shape), start + offsets[0])
        if start + offsets[1] > size:
            raise self._error(
                f"is truncated: tensor {name!r} ends at byte {start + offsets[1]}, but the file has {size}; fetch the file again"
            )
        if offsets[1] - offsets[0] != info.nbytes:
            raise self._error(
                f"is damaged: tensor {name!r} of shape {shape} in {dtype} needs {info.nbytes} bytes, but data_offsets are {offsets}"
            )
        return info, (start + offsets[0], start + offsets[1])

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            raise self._error(f"is damaged: its header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return content


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


class Checkpoint(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint, whichever file holds them: a mapping from names to `TensorInfo`."""

    def __init__(self, directory: Path, files: Sequence[SafetensorsFile]):
        self.directory = directory
        self._files: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file:
                if name in self._files:
                    both = f"{self._files[name].path.name} and {file.path.name}"
                    raise CheckpointError(f"{directory}: tensor {name!r} is in two files, {both}; remove one of them.")
                self._files[name] = file

    def __getitem__(self, name: str) -> TensorInfo:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """A copy of tensor `name`, or of the slices `index` of it; only their pages are read."""
        return self._files[name].read(name, index)

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._files[name].path


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Opens `model.safetensors`, or the files listed in `model.safetensors.index.json`, and checks that they are whole.

    Raises:
      CheckpointError: there is neither or both; a listed file is missing or damaged; a tensor is in two files, or not where the
        index says, or not in the index.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that does not belong to the checkpoint.")
    if single.exists():
        return Checkpoint(directory, [SafetensorsFile(single)])
    if not index.exists():
        raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}; give the directory of a checkpoint in the released layout.")
    where = _weight_map(index)
    checkpoint = Checkpoint(directory, [SafetensorsFile(directory / name) for name in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in checkpoint:
            raise CheckpointError(f"{directory / file} lacks tensor {name!r}, which {INDEX} places there; fetch the file again.")
        if checkpoint.path(name).name != file:
            raise CheckpointError(f"{index} places tensor {name!r} in {file}, but {checkpoint.path(name).name} holds it; fetch both again.")
    if len(unlisted := [name for name in checkpoint if name not in where]):
        raise CheckpointError(
            f"{checkpoint.path(unlisted[0])} holds {unlisted[0]!r}, which {INDEX} does not list ({len(unlisted)} such tensors); "
            "the files belong to different checkpoints, fetch them again."
        )
    return checkpoint


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text())
        where = content["weight_map"]
        if not isinstance(where, dict) or not where:
            raise TypeError("weight_map is no object, or empty")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no valid index ({error}); it needs an object weight_map of tensor names to files.") from error
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} places tensor {name!r} in {file!r}; only names of files in the same directory are allowed.")
    return where
