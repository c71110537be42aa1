"""Rows into batches. Batch k is a function of the data, the configuration and k: to continue a run is to know its step.

All documents are measured once, when the data is opened; the rows are planned from the sizes and stay the same in every
epoch, only their order changes. So batch k needs to read no more than the documents of its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.encoding import DocumentEncoder, Tokens
from interns1pro_jax.data.packing import Row, RowSize, plan_rows
from interns1pro_jax.data.quarantine import Quarantine
from interns1pro_jax.data.records import DataError, Document
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.models.time_series_inputs import Signal, pack_time_series
from interns1pro_jax.models.vision_inputs import VisionItem, pack_vision
from interns1pro_jax.ops.losses import IGNORED


class DocumentSource(Protocol):
    """Random access to documents; `records.DataError` from an item means that this document is damaged."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def name(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Attributes:
    row: static size of a row; its `tokens` is the sequence length.
    batch_size: rows in a batch.
    seed: of the order of documents and rows.
    max_bad_share: share of unusable documents beyond which the run stops.
    """

    row: RowSize
    batch_size: int = 8
    seed: int = 0
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if self.row.tokens < 1 or self.batch_size < 1:
            raise ConfigError(f"row.tokens={self.row.tokens} and batch_size={self.batch_size} must be positive.")
        if self.row.signal_pairs % 2:
            raise ConfigError(f"row.signal_pairs={self.row.signal_pairs} must be even: two pairs make a token.")


@dataclasses.dataclass(frozen=True, eq=False)
class AssembledRow:
    """The arrays of one row [T], and its media in reading order."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    images: list[VisionItem]
    signals: list[Signal]

    @classmethod
    def empty(cls, length: int) -> AssembledRow:
        zeros = np.zeros(length, np.int32)
        return cls(zeros, zeros.copy(), zeros.copy(), np.full(length, IGNORED, np.int32), [], [])

    def put(self, start: int, tokens: np.ndarray, labels: np.ndarray, segment: int) -> None:
        """Places a document, or a piece of one, as segment `segment`."""
        place = slice(start, start + len(tokens))
        self.tokens[place] = tokens
        self.labels[place] = labels
        self.positions[place] = np.arange(len(tokens))
        self.segment_ids[place] = segment


def collate(rows: Sequence[AssembledRow], row: RowSize, model: ModelConfig) -> Batch:
    """Rows as a batch of NumPy arrays of static shape; each row has its own media packs.

    Raises:
      ValueError: the placeholders of a row and its media do not match.
    """
    stacked: dict[str, Any] = {
        name: np.stack([getattr(r, name) for r in rows]) for name in ("tokens", "positions", "segment_ids", "labels")
    }
    labels = stacked.pop("labels")
    vision = time_series = None
    if model.vision is not None and row.patches:
        vision = pack_vision([r.images for r in rows], model.vision, size=row.patches)
    if model.time_series is not None and row.samples:
        time_series = pack_time_series([r.signals for r in rows], model.time_series, sizes=row.time_series)
    inputs = ModelInputs(**stacked, vision=vision, time_series=time_series)
    check_inputs(model, inputs)
    return Batch(inputs, labels)


class PackedData:
    """Documents as rows and batches: `data[k]` is batch k, for any k, epoch after epoch.

    Args:
      source: the documents.
      encoder: for the model's tokens and media.
      model: the model that reads the batches.
      config: sizes and order.
      labels: which tokens of a document are labels.

    Attributes:
      sizes: what each usable document needs, by index.
      rows: the plan; together they hold every usable document once.
      label_counts: how often each token is a label in one epoch [V], for `unigram`.
      quarantine: documents that were set aside, and why.

    Raises:
      DataError: no usable document, or too many unusable ones.
      ConfigError: the model has too small a vocabulary, or no tower for a medium of the documents.
    """

    def __init__(
        self,
        source: DocumentSource,
        encoder: DocumentEncoder,
        model: ModelConfig,
        config: PipelineConfig,
        labels: Callable[[Tokens], np.ndarray] = Tokens.labels,
    ):
        if encoder.tokenizer.vocab_size > model.text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {encoder.tokenizer.vocab_size} ids, more than the model's vocab_size={model.text.vocab_size}."
            )
        self._source, self._encoder, self._model, self._config, self._labels = source, encoder, model, config, labels
        self.quarantine = Quarantine(len(source), config.max_bad_share)
        self.label_counts = np.zeros(model.text.vocab_size, np.int64)
        measured = ((index, self._measure(index)) for index in range(len(source)))
        self.sizes = {index: size for index, size in measured if size is not None}
        if not self.sizes:
            raise DataError(f"none of {len(source)} documents can be used; prepare the data again or make rows larger than {config.row}.")
        self.rows = plan_rows(self.sizes, config.row, config.seed)
        self._batches = (
            grain.MapDataset.source(self.rows)
            .seed(config.seed)
            .shuffle()
            .repeat()
            .map(self.assemble)
            .batch(config.batch_size, batch_fn=self._collate)
        )

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch:
        """Batch `step`, from 0."""
        return self._batches[step]

    def in_order(self) -> Iterator[Batch]:
        """Every row once, in the order of the plan; the last batch is filled up with empty rows. A batch is made when it is asked for."""
        size = self._config.batch_size
        for start in range(0, len(self.rows), size):
            rows = [self.assemble(row) for row in self.rows[start : start + size]]
            yield self._collate(rows + [AssembledRow.empty(self._config.row.tokens)] * (size - len(rows)))

    def assemble(self, row: Row) -> AssembledRow:
        """The arrays of a planned row. A document that has become unreadable since it was measured leaves padding behind."""
        out = AssembledRow.empty(self._config.row.tokens)
        start = 0
        for segment, piece in enumerate(row, start=1):
            read = self._read(piece.document)
            if read is not None:
                document, tokens = read
                part = slice(piece.start, piece.stop)
                out.put(start, tokens.ids[part], self._labels(tokens)[part], segment)
                out.images.extend(self._encoder.images(document))
                out.signals.extend(tokens.signals)
            start += piece.stop - piece.start
        return out

    def _collate(self, rows: Sequence[AssembledRow]) -> Batch:
        return collate(rows, self._config.row, self._model)

    def _measure(self, index: int) -> RowSize | None:
        read = self._read(index)
        if read is None:
            return None
        tokens = read[1]
        if reason := tokens.size.misfit(self._config.row):
            self.quarantine.add(self._source.name(index), reason)
            return None
        labels = self._labels(tokens)
        self.label_counts += np.bincount(labels[labels != IGNORED], minlength=len(self.label_counts))
        return tokens.size

    def _read(self, index: int) -> tuple[Document, Tokens] | None:
        try:
            document = self._source[index]
            return document, self._encoder.tokenize(document)
        except ConfigError:
            raise  # the model is wrong for all documents of this kind, not the document for the model
        except (DataError, ValueError) as error:
            self.quarantine.add(self._source.name(index), str(error))
            return None
