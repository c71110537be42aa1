"""Makes prepared sources (`sources`) of documents: encodes, packs or chunks, writes shards and tables.

The input is cut into slices; each is turned into shards of its own, by any process, in any order, with the same result. A slice is done
when its marker is there, so a run that was killed goes on with the others. The manifest comes last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data import paths
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.examples import Example, encode_record
from interns1pro_jax.data.formats import RecordReader, parse_line
from interns1pro_jax.data.packing import COLUMNS, RowSize, attention_cost, plan_rows
from interns1pro_jax.data.quarantine import Fault
from interns1pro_jax.data.records import DataError, Document, RejectedRecord
from interns1pro_jax.data.sources import DOCUMENTS, MANIFEST, ROWS, Manifest, Shard, ShardWriter, vision_geometry, write_index
from interns1pro_jax.data.transforms import Transform
from interns1pro_jax.ops.losses import IGNORED

PARTS = "parts"
REJECTED = "rejected.jsonl"
# A larger one makes slower random reads where a store cannot seek, a smaller one more files.
_RECORDS_PER_SHARD = 4096
# What is packed together, at least; the rows that are left unfilled at its end are few beside it.
_ROWS_PACKED_TOGETHER, _TOKENS_PACKED_TOGETHER = 256, 1 << 22
_BYTES_PACKED_TOGETHER = 1 << 28


@dataclasses.dataclass(frozen=True)
class PreparationConfig:
    """What a source is to be.

    Attributes:
      kind: "documents", to be packed while training, or "rows", packed now.
      row: size of the rows that will be trained on; larger documents with media are rejected. None, for documents, leaves that to training.
      chunk_tokens: documents share a record until they have so many tokens; 0 gives each a record of its own. For long runs over short
        texts 65536 reads many times faster.
      slice_bytes: of the input, that one process works on at a time.
      max_rejected: share of rejected records above which the source is not completed.
    """

    kind: str
    row: RowSize | None
    chunk_tokens: int = 0
    slice_bytes: int = 1 << 26
    max_rejected: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in (DOCUMENTS, ROWS):
            raise ConfigError(f"kind={self.kind!r} must be {DOCUMENTS!r} or {ROWS!r}.")
        if self.kind == ROWS and self.row is None:
            raise ConfigError("packing rows takes the size of a row.")
        if self.slice_bytes < 1 or self.chunk_tokens < 0:
            raise ConfigError(f"slice_bytes={self.slice_bytes} must be positive and chunk_tokens={self.chunk_tokens} not negative.")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of an input file: bytes start..stop-1 of JSON lines (the lines that begin there), or row groups of Parquet."""

    path: str
    start: int
    stop: int
    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What a slice became."""

    shards: tuple[Shard, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray
    label_counts: np.ndarray
    documents: int
    tokens: int
    trained_tokens: int
    own_system: int
    licences: Mapping[str, int]
    faults: tuple[Fault, ...] = ()


class PartBuilder:
    """Turns documents into the shards of one part.

    Args:
      directory: of the source; None validates without writing.
    """

    def __init__(self, config: PreparationConfig, encoder: DocumentEncoder, directory: str | None, number: int):
        self._config, self._encoder, self._directory, self._number = config, encoder, directory, number
        self._writer: ShardWriter | None = None
        self._shards: list[Shard] = []
        self._in_shard = 0
        self._waiting: list[Example] = []
        self._waiting_tokens = self._waiting_bytes = 0
        self._records: list[int] = []  # documents of each
        self._sizes: list[tuple[int, ...]] = []
        self._costs: list[float] = []
        self._label_counts = np.zeros(encoder.tokenizer.vocab_size, np.int64)
        self._documents = self._tokens = self._trained = self._own_system = 0
        self._licences: Counter[str] = Counter()

    def add(self, document: Document) -> None:
        """Encodes a document and takes it over.

        Raises:
          DataError: it cannot be used; `reason` says why.
          ConfigError: the model has no tower for its media.
        """
        try:
            example = self._encoder.encode(document)
        except ValueError as error:
            raise RejectedRecord("cannot be encoded", str(error)) from error
        has_system = bool(document.messages and document.messages[0].get("role") == "system")
        self.add_example(example, document.licence, has_system)

    def add_example(self, example: Example, licence: str = "", has_system: bool = False) -> None:
        """Takes over an encoded document.

        Raises:
          DataError: as `add`.
        """
        if self._config.row is not None and (reason := example.size.misfit(self._config.row)):
            raise RejectedRecord("too large for a row", reason)
        labels = example.labels()
        if (labels == IGNORED).all():
            raise RejectedRecord("nothing to learn", "no token of it is a label.")
        self._label_counts += np.bincount(labels[labels != IGNORED], minlength=len(self._label_counts))
        self._trained += int((labels != IGNORED).sum())
        self._documents += 1
        self._tokens += len(example.ids)
        self._licences[licence] += 1
        self._own_system += has_system
        self._waiting.append(example)
        self._waiting_tokens += len(example.ids)
        self._waiting_bytes += _bytes_of(example)
        enough = self._config.chunk_tokens
        if self._config.kind == ROWS and self._config.row is not None:
            enough = max(_ROWS_PACKED_TOGETHER * self._config.row.tokens, _TOKENS_PACKED_TOGETHER)
        full = self._waiting_tokens >= enough
        if full or self._waiting_bytes >= _BYTES_PACKED_TOGETHER:
            self._flush()

    def finish(self, faults: Sequence[Fault] = ()) -> Part:
        """Writes what is left."""
        self._flush()
        if self._writer is not None:
            self._shards.append(self._writer.close())
        return Part(
            tuple(self._shards),
            np.cumsum([0, *self._records]),
            np.array(self._sizes, np.int32).reshape(-1, len(COLUMNS)),
            np.array(self._costs, np.float32),
            self._label_counts,
            self._documents,
            self._tokens,
            self._trained,
            self._own_system,
            dict(self._licences),
            tuple(faults),
        )

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_tokens, self._waiting_bytes = self._waiting, [], 0, 0
        if not waiting:
            return
        if self._config.kind == DOCUMENTS or self._config.row is None:
            self._records.append(len(waiting))
            self._sizes += [dataclasses.astuple(example.size) for example in waiting]
            self._write(encode_record(waiting))
            return
        sizes = np.array([dataclasses.astuple(example.size) for example in waiting], np.int64)
        plan = plan_rows(sizes, self._config.row, np.arange(len(waiting)))
        for number in range(len(plan)):
            pieces = plan.row(number)
            placed = zip(plan.document[pieces].tolist(), plan.start[pieces].tolist(), plan.stop[pieces].tolist(), strict=True)
            examples = [waiting[document].piece(start, stop) for document, start, stop in placed]
            self._costs.append(attention_cost([len(example.ids) for example in examples]))
            self._write(encode_record(examples))

    def _write(self, record: bytes) -> None:
        if self._directory is None:
            return
        if self._writer is None or self._in_shard == _RECORDS_PER_SHARD:
            if self._writer is not None:
                self._shards.append(self._writer.close())
            self._writer = ShardWriter(self._directory, f"shards/{self._number:06d}-{len(self._shards):04d}.array_record")
            self._in_shard = 0
        self._writer.write(record)
        self._in_shard += 1


def complete(directory: str, parts: Sequence[Part], config: PreparationConfig, encoder: DocumentEncoder, content: str) -> Manifest:
    """Writes the tables and the manifest of a source whose parts are all there.

    Raises:
      DataError: no document, or too many rejected records.
    """
    faults = [fault for part in parts for fault in part.faults]
    documents = sum(part.documents for part in parts)
    if not documents:
        raise DataError(f"no document of {directory} can be used; {_reasons_in_words(faults)}.")
    if len(faults) > config.max_rejected * (documents + len(faults)):
        raise DataError(
            f"{len(faults)} of {documents + len(faults)} records were rejected ({_reasons_in_words(faults)}), more than the allowed share "
            f"{config.max_rejected:g}; {paths.join(directory, REJECTED)} names them. Repair the input, or raise --max_rejected."
        )
    shifts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    arrays = {"label_counts": np.sum([part.label_counts for part in parts], axis=0)}
    if config.kind == ROWS:
        arrays["costs"] = np.concatenate([part.costs for part in parts])
    else:
        sizes = np.concatenate([part.sizes for part in parts])
        arrays["sizes"] = sizes if sizes[:, 1:].any() else sizes[:, :1]
        arrays["offsets"] = np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=False))])
    write_index(directory, arrays)
    licences: Counter[str] = Counter()
    for part in parts:
        licences.update(part.licences)
    manifest = Manifest(
        kind=config.kind,
        shards=tuple(shard for part in parts for shard in part.shards),
        documents=documents,
        tokens=sum(part.tokens for part in parts),
        trained_tokens=sum(part.trained_tokens for part in parts),
        row=config.row if config.kind == ROWS else None,
        tokenizer=encoder.tokenizer.fingerprint,
        vision=vision_geometry(encoder.model),
        rejected=dict(Counter(fault.reason for fault in faults)),
        own_system=sum(part.own_system for part in parts),
        content=content,
        licences=dict(licences),
    )
    paths.write_bytes(paths.join(directory, MANIFEST), manifest.to_json())
    paths.remove_tree(paths.join(directory, PARTS))
    return manifest


def write_documents(
    directory: str, documents: Iterable[Document], config: PreparationConfig, encoder: DocumentEncoder, content: str = ""
) -> Manifest:
    """Makes a source of documents in memory.

    Raises:
      DataError: see `complete`; and a document that cannot be used.
    """
    builder = PartBuilder(config, encoder, directory, 0)
    for document in documents:
        builder.add(document)
    return complete(directory, [builder.finish()], config, encoder, content)


def slices_of(inputs: Sequence[str], slice_bytes: int) -> list[Slice]:
    """The parts of input files (patterns allowed) that are worked on at a time.

    Raises:
      ConfigError: a pattern that matches nothing, or a file that is neither JSON lines nor Parquet.
    """
    found: list[Slice] = []
    for pattern in inputs:
        files = paths.glob(pattern)
        if not files or any(paths.size(file) is None for file in files):
            raise ConfigError(f"{pattern} matches no file.")
        for path in files:
            if path.endswith(".parquet"):
                groups = _parquet(path).num_row_groups
                found += [Slice(path, group, group + 1, len(found) + group) for group in range(groups)]
            elif path.endswith((".jsonl", ".json")):
                size = paths.size(path) or 0
                found += [
                    Slice(path, start, min(start + slice_bytes, size), len(found) + number)
                    for number, start in enumerate(range(0, size, slice_bytes))
                ]
            else:
                raise ConfigError(f"{path} is neither JSON lines (.jsonl) nor Parquet (.parquet).")
    return found


def prepare_slice(
    piece: Slice,
    config: PreparationConfig,
    encoder: DocumentEncoder,
    reader: RecordReader,
    transform: Transform | None,
    directory: str | None,
) -> Part:
    """Encodes the records of a slice. Whatever is wrong with one of them is a fault with a reason, and harms no other."""
    builder, faults = PartBuilder(config, encoder, directory, piece.number), []
    for where, record in _records(piece):
        try:
            if isinstance(record, Exception):
                raise record
            content = transform(record, where) if transform is not None and isinstance(record, Mapping) else record
            builder.add(reader.document(content, where))
        except DataError as error:
            faults.append(Fault(where, str(error.reason), str(error)))
    return builder.finish(faults)


def digest(config: PreparationConfig, encoder: DocumentEncoder, reader: RecordReader, extra: Any) -> str:
    """Equal digests mean that a slice would become the same part."""
    content: list[Any] = [dataclasses.asdict(config), vision_geometry(encoder.model), encoder.model.time_series is not None]
    content += [dataclasses.asdict(encoder.bounds), dataclasses.asdict(reader), encoder.tokenizer.fingerprint, extra]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def save_part(directory: str, number: int, part: Part, content: str) -> None:
    """Marks a slice as done."""
    arrays = {name: getattr(part, name) for name in ("offsets", "sizes", "costs", "label_counts")}
    rest = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.name not in arrays}
    rest["shards"] = [dataclasses.asdict(shard) for shard in part.shards]
    stored = io.BytesIO()
    np.savez(stored, manifest=np.frombuffer(json.dumps({"content": content, **rest}).encode(), np.uint8), **arrays)
    paths.write_bytes(_marker(directory, number), stored.getvalue())


def load_part(directory: str, number: int, content: str) -> Part | None:
    """A slice that was done before, of the same content; None if there is none."""
    marker = _marker(directory, number)
    if not paths.exists(marker):
        return None
    try:
        with np.load(io.BytesIO(paths.read_bytes(marker)), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("offsets", "sizes", "costs", "label_counts")}
            rest = json.loads(stored["manifest"].tobytes())
        if rest.pop("content") != content:
            return None
        rest["shards"] = tuple(Shard(**shard) for shard in rest["shards"])
        rest["faults"] = tuple(Fault(*fault) for fault in rest["faults"])
        return Part(**arrays, **rest)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of another version or cut short: it is made again


def write_rejected(directory: str, parts: Sequence[Part]) -> None:
    """The list of rejected records, with their reasons."""
    lines = [json.dumps(fault._asdict()) + "\n" for part in parts for fault in part.faults]
    paths.write_bytes(paths.join(directory, REJECTED), "".join(lines).encode())


def _marker(directory: str, number: int) -> str:
    return paths.join(directory, f"{PARTS}/{number:06d}.npz")


def _records(piece: Slice) -> Iterator[tuple[str, Any]]:
    """Records of a slice with the names of their places; a line that is no JSON comes as its exception."""
    if piece.path.endswith(".parquet"):
        rows = _parquet(piece.path).read_row_group(piece.start).to_pylist()
        for number, row in enumerate(rows):
            yield f"{piece.path}[{piece.start}:{number}]", _without_none(row)
        return
    with paths.open_read(piece.path) as file:
        position = piece.start
        if position:
            # The line that covers the byte before this slice belongs to the one before.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < piece.stop and (line := file.readline()):
            where, position = f"{piece.path}@{position}", position + len(line)
            if not line.strip():
                continue
            try:
                yield where, parse_line(line)
            except RejectedRecord as error:
                yield where, error


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow; install interns1pro_jax[data].") from error
    try:
        return pyarrow.parquet.ParquetFile(paths.open_read(path))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is no Parquet file ({error}).") from error


def _without_none(value: Any) -> Any:
    """Parquet gives every record all columns, and every struct all fields."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _bytes_of(example: Example) -> int:
    """Of its media, nearly."""
    total = 0
    for medium in example.media:
        content = getattr(medium, "content", None)
        total += len(content) if content is not None else getattr(medium, "frames", getattr(medium, "samples", np.zeros(0))).nbytes
    return total


def _reasons_in_words(faults: Sequence[Fault]) -> str:
    counts = Counter(fault.reason for fault in faults)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "there are no records"
