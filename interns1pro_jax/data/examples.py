"""Encoded documents and their records: what training reads.

A record holds one or more documents as one run of token ids with their lengths, so that reading costs little per document: a
chunk of many short texts, one conversation with its pictures, or a packed row. It is msgpack in an ArrayRecord; the container's
checksums find a damaged record without harming its neighbours.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from interns1pro_jax.data.image_processing import item_of_grid
from interns1pro_jax.data.media.images import read_image
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import DamagedRecord, DataError
from interns1pro_jax.data.video_processing import video_item
from interns1pro_jax.models.time_series_inputs import Signal, prepare_signal
from interns1pro_jax.models.vision_inputs import VisionItem
from interns1pro_jax.ops.losses import IGNORED
from interns1pro_jax.tower_config import AnyVision

VERSION = 2


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImage:
    """The bytes of an image file, and the grid of patches that its placeholders were counted for."""

    content: bytes
    grid: tuple[int, int, int]

    def item(self, config: AnyVision) -> VisionItem:
        """Its patches.

        Raises:
          DataError: the file cannot be read.
        """
        return item_of_grid(read_image(self.content), self.grid, config)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredVideo:
    """The sampled frames of a video."""

    frames: np.ndarray

    def item(self, config: AnyVision) -> VisionItem:
        return video_item(self.frames, config)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSignal:
    """A recording [length, channels] and its rate in Hz."""

    samples: np.ndarray
    sampling_rate: float | None

    def signal(self) -> Signal:
        """Normalised and cut.

        Raises:
          ValueError: values that are not finite.
        """
        return prepare_signal(self.samples, self.sampling_rate)


Medium = StoredImage | StoredVideo | StoredSignal


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An encoded document.

    Attributes:
      ids: text, and placeholders between the marks that open and close a medium.
      trained: which tokens a model learns to write.
      media: contents of the placeholders, in reading order.
      size: what it needs of a row.
      name: where it comes from.
      tags: what it is.
      tail: the label of the last token: the token that follows in a text that was cut, or none.
    """

    ids: Int[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"]
    media: tuple[Medium, ...]
    size: RowSize
    name: str
    tags: tuple[str, ...] = ()
    tail: int = IGNORED

    def labels(self, counted: Bool[np.ndarray, " tokens"] | None = None) -> Int[np.ndarray, " tokens"]:
        """For each position the next token of the document, or -100 where that is not learnt (or not in `counted`)."""
        wanted = self.trained if counted is None else self.trained & counted
        labels = np.full(len(self.ids), self.tail, np.int32)
        labels[:-1] = np.where(wanted[1:], self.ids[1:], IGNORED)
        return labels

    def piece(self, start: int, stop: int) -> Example:
        """Tokens start..stop-1 of a text."""
        if (start, stop) == (0, len(self.ids)):
            return self
        tail = int(self.labels()[stop - 1])
        return dataclasses.replace(self, ids=self.ids[start:stop], trained=self.trained[start:stop], size=RowSize(stop - start), tail=tail)


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Documents of a record, one after the other.

    Attributes:
      ids, labels, trained: of all documents together; see `Example`. `trained` is None where all are.
      lengths: of each document.
      media: number of the document, and medium, in reading order.
      origins: names, tags and sizes of the documents, unpacked when they are asked for.
    """

    ids: Int[np.ndarray, " tokens"]
    labels: Int[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"] | None
    lengths: Int[np.ndarray, " documents"]
    media: tuple[tuple[int, Medium], ...]
    origins: bytes

    def starts(self) -> Int[np.ndarray, " documents"]:
        return np.cumsum(self.lengths) - self.lengths

    def names(self) -> list[str]:
        """Where each document comes from."""
        return [name for name, _, _ in msgpack.unpackb(self.origins)]

    def example(self, document: int) -> Example:
        """A document as it was encoded."""
        start = int(self.starts()[document])
        place = slice(start, start + int(self.lengths[document]))
        ids, labels = self.ids[place], self.labels[place]
        trained = np.ones(len(ids), bool) if self.trained is None else self.trained[place]
        media = tuple(medium for number, medium in self.media if number == document)
        name, tags, size = msgpack.unpackb(self.origins)[document]
        return Example(ids, trained, media, RowSize(*size), name, tuple(tags), int(labels[-1]))


def encode_record(examples: Sequence[Example]) -> bytes:
    """The record of some documents."""
    content: dict[str, Any] = {
        "version": VERSION,
        "ids": np.concatenate([example.ids for example in examples]).astype("<i4").tobytes(),
        "lengths": np.array([len(example.ids) for example in examples], "<i4").tobytes(),
        "tails": np.array([example.tail for example in examples], "<i4").tobytes(),
        "trained": None if all(e.trained.all() for e in examples) else _packed([e.trained for e in examples]),
        "media": [[number, *_encode_medium(medium)] for number, example in enumerate(examples) for medium in example.media],
        "origins": msgpack.packb([[e.name, e.tags, dataclasses.astuple(e.size)] for e in examples]),
    }
    return msgpack.packb(content)


def decode_record(record: bytes) -> Record:
    """The documents of a record.

    Raises:
      DamagedRecord: bytes that are no record of this version, or sizes that contradict each other.
    """
    try:
        content = msgpack.unpackb(record)
        if content["version"] != VERSION:
            raise DamagedRecord(f"record version {content['version']!r}; this program reads version {VERSION}: prepare the data again.")
        ids, lengths, tails = (np.frombuffer(content[name], "<i4") for name in ("ids", "lengths", "tails"))
        if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(ids) or len(tails) != len(lengths):
            raise DamagedRecord(f"a record of {len(ids)} tokens cannot have documents of {lengths[:8].tolist()} tokens.")
        labels = np.empty_like(ids)
        labels[:-1] = ids[1:]
        trained = None
        if content["trained"] is not None:
            trained = np.unpackbits(np.frombuffer(content["trained"], np.uint8), count=len(ids)).view(bool)
            labels[:-1][~trained[1:]] = IGNORED
        labels[np.cumsum(lengths) - 1] = tails
        media = tuple((number, _decode_medium(*fields)) for number, *fields in content["media"])
        return Record(ids, labels, trained, lengths, media, content["origins"])
    except DataError:
        raise
    except Exception as error:  # whatever broken bytes lead to: msgpack's errors, missing keys, wrong types or sizes
        raise DamagedRecord(f"not a record of documents ({type(error).__name__}: {error}).") from error


def png(pixels: np.ndarray) -> bytes:
    """An image file of pixels; lossless."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _packed(trained: Sequence[np.ndarray]) -> bytes:
    return np.packbits(np.concatenate(trained)).tobytes()


def _encode_medium(medium: Medium) -> list[Any]:
    match medium:
        case StoredImage(content, grid):
            return ["image", content, list(grid)]
        case StoredVideo(frames):
            return ["video", frames.tobytes(), list(frames.shape)]
        case StoredSignal(samples, rate):
            return ["signal", samples.astype("<f4").tobytes(), list(samples.shape), rate]


def _decode_medium(kind: str, content: bytes, shape: Sequence[int], *rest: Any) -> Medium:
    match kind, rest:
        case "image", []:
            frames, rows, columns = shape
            return StoredImage(content, (frames, rows, columns))
        case "video", []:
            return StoredVideo(np.frombuffer(content, np.uint8).reshape(shape))
        case "signal", [rate]:
            return StoredSignal(np.frombuffer(content, "<f4").reshape(shape), rate)
        case _:
            raise DamagedRecord(f"unknown medium {kind!r} with {len(rest)} more fields.")
