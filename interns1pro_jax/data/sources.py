"""Prepared sources: the directory that `tools.prepare_data` writes, and random access to its records.

manifest.json          what it is: kind, shards, tokenizer, counts; written last, so a directory that has one is complete
shards/*.array_record  records (`examples`)
index/offsets.npy      of the documents of each record in the table of sizes (kind "documents")
index/sizes.npy        what each document needs of a row, in the columns of `packing.COLUMNS` (only tokens where there are no media)
index/costs.npy        attention cost of each row (kind "rows")
index/label_counts.npy how often each token is a label
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data import paths
from interns1pro_jax.data.examples import Example, Record, decode_record
from interns1pro_jax.data.mixture import SourceSize
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import DamagedRecord, DataError

MANIFEST = "manifest.json"
FORMAT = 2
DOCUMENTS, ROWS = "documents", "rows"

# An open reader keeps a file descriptor and about 34 bytes for each record of its file, so only so many stay open.
_MAX_OPEN = 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records: its path within the source, how many records, and what its bytes must be."""

    name: str
    records: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared source is.

    Attributes:
      kind: DOCUMENTS, which are packed while training, or ROWS, packed beforehand for `row`.
      shards: its files.
      documents, tokens, trained_tokens: in all of them.
      row: size of the rows; None for documents.
      tokenizer: fingerprint of the tokenizer.
      vision: patch size, merge size and temporal patch size that images were measured for; None without a vision tower.
      rejected: how many records of the input could not be used, by reason.
      own_system: documents that begin with a system message of their own.
      content: digest of the configuration and the input that it was made of.
      licences: documents by licence.
    """

    kind: str
    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    trained_tokens: int
    row: RowSize | None
    tokenizer: str
    vision: tuple[int, int, int] | None
    rejected: Mapping[str, int]
    own_system: int
    content: str
    licences: Mapping[str, int]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal data."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1).encode()

    @classmethod
    def read(cls, directory: str) -> Manifest:
        """The manifest of a directory.

        Raises:
          DataError: there is none, or it is not one of ours.
        """
        path = paths.join(directory, MANIFEST)
        if not paths.exists(path):
            raise DataError(f"{directory} holds no prepared source ({MANIFEST} is absent); make it with python -m tools.prepare_data.")
        try:
            content = json.loads(paths.read_bytes(path))
            if content.pop("format") != FORMAT:
                raise DataError(f"{path} has another format; delete the directory and prepare the data again.")
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            content["row"] = content["row"] and RowSize(**content["row"])
            content["vision"] = content["vision"] and tuple(content["vision"])
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is broken ({type(error).__name__}: {error}); delete the directory and prepare it again.") from error


def vision_geometry(model: ModelConfig) -> tuple[int, int, int] | None:
    """What the number of an image's placeholders depends on."""
    vision = model.vision
    return None if vision is None else (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


class PreparedSource:
    """Random access to the records of a prepared source; safe to use from several threads.

    Args:
      directory: local, gs:// or s3://. Shards of gs:// are read in place by array_record, those of other stores are copied while open.

    Raises:
      DataError: no prepared source.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.manifest = Manifest.read(directory)
        self._ends = list(itertools.accumulate(shard.records for shard in self.manifest.shards))
        self._readers: OrderedDict[int, tuple[array_record_module.ArrayRecordReader, contextlib.ExitStack]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> str:
        return self.directory  # for worker processes, which open their own readers

    def __setstate__(self, directory: str) -> None:
        self.__init__(directory)  # type: ignore[misc]

    @property
    def size(self) -> SourceSize:
        return SourceSize(len(self), self.manifest.tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Documents offsets[r]..offsets[r+1]-1 of the table of sizes are record r's."""
        return self._index("offsets")

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        return self._index("sizes")

    @functools.cached_property
    def costs(self) -> np.ndarray:
        return self._index("costs")

    @functools.cached_property
    def label_counts(self) -> np.ndarray:
        return self._index("label_counts")

    def _index(self, name: str) -> np.ndarray:
        path = paths.join(self.directory, f"index/{name}.npy")
        try:
            if paths.is_local(path):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
                    array.base.madvise(mmap.MADV_RANDOM)  # draws are random: what lies beside them is not worth its memory
                return array
            return np.load(io.BytesIO(paths.read_bytes(path)), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); prepare the data again.") from error

    def bytes_of(self, index: int) -> bytes:
        """Record `index` as it is in its shard.

        Raises:
          DamagedRecord: the shard is absent or cut short, or the record damaged.
        """
        shard, row = self._place(index)
        try:
            with self._lock:
                reader = self._reader(shard)
                # `read([row])` would cost time proportional to the records in the file; a range does not.
                (record,) = reader.read(row, row + 1)
        except RuntimeError as error:
            if isinstance(error, DataError):
                raise
            raise DamagedRecord(f"{self.name(index)} is damaged ({error}); prepare its shard again.") from error
        return record

    def __getitem__(self, index: int) -> Record:
        """Record `index`.

        Raises:
          DamagedRecord: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}.")
        return decode_record(self.bytes_of(index))

    def name(self, index: int) -> str:
        """Where record `index` is, readable or not."""
        shard, row = self._place(index)
        return f"{paths.join(self.directory, self.manifest.shards[shard].name)}[{row}]"

    def damaged(self) -> list[str]:
        """Shards whose bytes are not those that were written; reads everything."""
        found = []
        for shard in self.manifest.shards:
            path = paths.join(self.directory, shard.name)
            if paths.size(path) != shard.size or sha256_of(path) != shard.sha256:
                found.append(shard.name)
        return found

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        if number in self._readers:
            self._readers.move_to_end(number)
            return self._readers[number][0]
        shard = self.manifest.shards[number]
        path = paths.join(self.directory, shard.name)
        if (found := paths.size(path)) != shard.size:
            what = "is absent" if found is None else f"has {found} bytes"
            raise DamagedRecord(f"{path} {what}, but {shard.size} bytes were written; prepare it again.")
        if len(self._readers) == _MAX_OPEN:
            reader, stack = self._readers.popitem(last=False)[1]
            reader.close()
            stack.close()
        stack = contextlib.ExitStack()
        local = path if path.startswith("gs://") else stack.enter_context(paths.local_copy(path))
        self._readers[number] = (array_record_module.ArrayRecordReader(local), stack)
        return self._readers[number][0]


def read_examples(directory: str) -> list[Example]:
    """All documents of a source; for small ones, such as held-out data.

    Raises:
      DataError: it holds packed rows, or a record cannot be read.
    """
    source = PreparedSource(directory)
    if source.manifest.kind != DOCUMENTS:
        raise DataError(f"{directory} holds packed rows; prepare it as documents to evaluate on it.")
    records = (source[index] for index in range(len(source)))
    return [record.example(number) for record in records for number in range(len(record.lengths))]


class ShardWriter:
    """Writes records to a local file; which gets its name only when it is complete.

    One record is one chunk of the container, so a random read decompresses nothing else.
    """

    def __init__(self, directory: str, name: str):
        self._path, self._name = paths.join(directory, name), name
        self._stack = contextlib.ExitStack()
        self._local = self._stack.enter_context(paths.replacing(self._path))
        self._writer = array_record_module.ArrayRecordWriter(self._local, "group_size:1,zstd:1")
        self._records = 0

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self._records += 1

    def close(self) -> Shard:
        self._writer.close()
        shard = Shard(self._name, self._records, Path(self._local).stat().st_size, sha256_of(self._local))
        self._stack.close()
        return shard


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with paths.open_read(str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_index(directory: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the tables of a source."""
    for name, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        paths.write_bytes(paths.join(directory, f"index/{name}.npy"), content.getvalue())


def check_fits(sources: Sequence[PreparedSource], tokenizer: str, model: ModelConfig, row: RowSize) -> None:
    """Whether sources were prepared for this tokenizer (by its fingerprint), model and size of rows.

    Raises:
      DataError: naming the source that was not.
    """
    geometry: Any = vision_geometry(model)
    for source in sources:
        manifest = source.manifest
        if manifest.tokenizer != tokenizer:
            raise DataError(f"{source.directory} was prepared with another tokenizer; prepare it again with the one of this run.")
        if manifest.vision is not None and row.patches and manifest.vision != geometry:  # rows without patches have text alone
            raise DataError(
                f"{source.directory} was prepared for patches of {manifest.vision} (size, merge, frames), the model has {geometry}; "
                "prepare it again with this model."
            )
        if manifest.row is not None and manifest.row != row:
            raise DataError(f"{source.directory} was packed for {manifest.row}, the run has {row}; prepare it again or change RowSize.")
