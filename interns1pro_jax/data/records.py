"""The record schema. A document is a sequence of parts (text, image, signal) with its origin; a record is its msgpack form.

Record files are ArrayRecord, one document per record. A file is complete or absent, and the container's own checksums find
any damaged record without harming its neighbours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, UInt8

_VERSION = 1
# One record per chunk: a random read then decompresses nothing else.
_WRITER_OPTIONS = "group_size:1,zstd:1"


class DataError(RuntimeError):
    """Data that cannot be used: a damaged or misfitting record, file or directory. The message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class TextPart:
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePart:
    """An image, as it came: resizing belongs to the reader, who knows the model."""

    pixels: UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class SignalPart:
    """A recording in physical units; normalisation belongs to the reader.

    Attributes:
      samples: all channels over time.
      sampling_rate: in Hz; None where time has no scale.
      unit: of the samples, for example "mV".
    """

    samples: Float[np.ndarray, "length channels"]
    sampling_rate: float | None
    unit: str


Part = TextPart | ImagePart | SignalPart


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One training document.

    Attributes:
      parts: in reading order.
      source: name of the collection it comes from.
      licence: terms under which it may be used.
      identifier: unique within the source.
      tags: what it is, for selection and statistics.
    """

    parts: tuple[Part, ...]
    source: str
    licence: str
    identifier: str
    tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source}:{self.identifier}"


def encode(document: Document) -> bytes:
    """The record of a document.

    Raises:
      DataError: a part that `decode` would not accept.
    """
    parts: list[list[Any]] = []
    for part in document.parts:
        _check(part)
        match part:
            case TextPart(text):
                parts.append(["text", text])
            case ImagePart(pixels):
                parts.append(["image", *pixels.shape[:2], pixels.tobytes()])
            case SignalPart(samples, rate, unit):
                parts.append(["signal", *samples.shape, rate, unit, samples.astype("<f4").tobytes()])
    content = {
        "version": _VERSION,
        "parts": parts,
        "source": document.source,
        "licence": document.licence,
        "identifier": document.identifier,
        "tags": list(document.tags),
    }
    return msgpack.packb(content)


def decode(record: bytes) -> Document:
    """The document of a record.

    Raises:
      DataError: bytes that are no record of this version, sizes that contradict each other, samples that are not finite.
    """
    try:
        content = msgpack.unpackb(record)
        if content["version"] != _VERSION:
            raise DataError(f"record version {content['version']!r}; this program reads version {_VERSION}: prepare the data again.")
        parts = tuple(_decode_part(*fields) for fields in content["parts"])
        origin = {name: _of_type(content[name], str) for name in ("source", "licence", "identifier")}
        tags = tuple(_of_type(tag, str) for tag in content["tags"])
    except DataError:
        raise
    except Exception as error:  # whatever broken bytes lead to: msgpack's errors, missing keys, wrong types or sizes
        raise DataError(f"not a document record ({type(error).__name__}: {error}).") from error
    for part in parts:
        _check(part)
    return Document(parts, tags=tags, **origin)


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"expected {kind.__name__}, found {type(value).__name__}.")
    return value


def _decode_part(kind: str, *fields: Any) -> Part:
    match kind, fields:
        case "text", [text]:
            return TextPart(text)
        case "image", [height, width, pixels]:
            return ImagePart(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))
        case "signal", [length, channels, rate, unit, samples]:
            return SignalPart(np.frombuffer(samples, "<f4").reshape(length, channels).astype(np.float32), rate, unit)
        case _:
            raise DataError(f"unknown part {kind!r} with {len(fields)} fields.")


def _check(part: Part) -> None:
    match part:
        case TextPart(text):
            _of_type(text, str)
        case ImagePart(pixels):
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
                raise DataError(f"an image is {pixels.dtype} {list(pixels.shape)}, expected uint8 [height, width, 3].")
        case SignalPart(samples, rate, unit):
            _of_type(unit, str)
            if samples.ndim != 2 or 0 in samples.shape or samples.dtype.kind != "f":
                raise DataError(f"a signal is {samples.dtype} {list(samples.shape)}, expected float32 [length, channels].")
            if not np.isfinite(samples).all():
                raise DataError(f"a signal has {np.count_nonzero(~np.isfinite(samples))} values that are not finite; fill or cut the gaps.")
            if rate is not None and not 0 < rate < float("inf"):
                raise DataError(f"sampling rate {rate!r} must be positive and finite, or None where it is unknown.")


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """A written file of records: its path within the data directory, how many records, and what its bytes must be."""

    name: str
    records: int
    size: int
    sha256: str


def write_records(directory: Path, name: str, documents: Iterable[Document]) -> RecordFile:
    """Writes documents in order to `directory / name`; the file appears under its name only when it is complete."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    count = 0
    for document in documents:
        writer.write(encode(document))
        count += 1
    writer.close()
    os.replace(partial, path)
    return RecordFile(name, count, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
