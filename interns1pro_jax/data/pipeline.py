"""Planned rows into batches. A process makes the rows of its own devices; Grain reads ahead."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.examples import Example, Record, StoredSignal
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.plan import KEPT_RECORDS, BatchPlan, PlannedRow
from interns1pro_jax.data.quarantine import Counts, Fault, Quarantine
from interns1pro_jax.data.records import DataError
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.models.time_series_inputs import Signal, pack_time_series
from interns1pro_jax.models.vision_inputs import VisionItem, pack_vision
from interns1pro_jax.ops.losses import IGNORED
from interns1pro_jax.processes import gather

_ARRAYS = ("tokens", "positions", "segment_ids", "labels")


@dataclasses.dataclass(frozen=True)
class ReadConfig:
    """How batches are read; nothing of it changes them.

    Attributes:
      threads: that make batches at the same time.
      ahead: batches that are made before they are asked for.
      processes: processes that share the work instead of threads of this one; for media, whose decoding is Python's bottleneck.
    """

    threads: int = 2
    ahead: int = 2
    processes: int = 0


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
        self.positions[place] = _count(len(tokens))
        self.segment_ids[place] = segment

    def put_record(self, record: Record) -> None:
        """Places all documents of a record as segments 1, 2, ..."""
        length = len(record.ids)
        self.tokens[:length] = record.ids
        self.labels[:length] = record.labels
        np.subtract(_count(length), np.repeat(record.starts().astype(np.int32), record.lengths), out=self.positions[:length])
        self.segment_ids[:length] = np.repeat(_count(len(record.lengths)) + 1, record.lengths)

    def put_media(self, media: Sequence[Any], model: ModelConfig) -> None:
        """Adds the media of a document, decoded; of a document with a broken one, none."""
        images, signals = [], []
        for medium in media:
            if isinstance(medium, StoredSignal):
                signals.append(medium.signal())
            elif model.vision is None:
                raise ConfigError("the data has images, but the model has no vision tower; set ModelConfig.vision.")
            else:
                images.append(medium.item(model.vision))
        self.images.extend(images)
        self.signals.extend(signals)


@functools.lru_cache(maxsize=8)
def _arange(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)


def _count(length: int) -> np.ndarray:
    """0, 1, ..., length - 1; a view of one array per power of two."""
    return _arange(1 << max(length - 1, 0).bit_length())[:length]


def collate(rows: Sequence[AssembledRow], row: RowSize, model: ModelConfig) -> Batch:
    """Rows as a batch of NumPy arrays of static shape; each row has its own media packs.

    Raises:
      ValueError: the placeholders of a row and its media do not match.
    """
    return _batch_of({name: np.stack([getattr(r, name) for r in rows]) for name in _ARRAYS}, rows, row, model)


def _batch_of(arrays: Mapping[str, np.ndarray], rows: Sequence[AssembledRow], row: RowSize, model: ModelConfig) -> Batch:
    """A batch of arrays that are there, and the media of rows."""
    stacked: dict[str, Any] = dict(arrays)
    labels = stacked.pop("labels")
    vision = time_series = None
    if model.vision is not None and row.patches:
        vision = pack_vision([r.images for r in rows], model.vision, size=row.patches)
    if model.time_series is not None and row.samples:
        time_series = pack_time_series([r.signals for r in rows], model.time_series, sizes=row.time_series)
    inputs = ModelInputs(**stacked, vision=vision, time_series=time_series)
    check_inputs(model, inputs)
    return Batch(inputs, labels)


def row_of_examples(examples: Sequence[Example], length: int, model: ModelConfig) -> AssembledRow:
    """A row of whole documents."""
    row, start = AssembledRow.empty(length), 0
    for segment, example in enumerate(examples, start=1):
        row.put(start, example.ids, example.labels(), segment)
        row.put_media(example.media, model)
        start += len(example.ids)
    return row


class LocalBatch(NamedTuple):
    """A process's rows of a batch, and what could not be read for them: of `records` records."""

    batch: Batch
    faults: tuple[Fault, ...]
    records: int


class RowReader:
    """Makes planned rows. Can be pickled.

    Args:
      plan: of the batches.
      places: which rows of a batch are wanted.
      model: that reads them.
      prefixes: tokens of each source's system prompt, put before each of its documents.
    """

    def __init__(self, plan: BatchPlan, places: Int[np.ndarray, " local"], model: ModelConfig, prefixes: Sequence[np.ndarray]):
        self._plan, self._places, self._model, self._prefixes = plan, places, model, prefixes
        self._kept: OrderedDict[tuple[int, int], Record] = OrderedDict()

    def __call__(self, step: int) -> LocalBatch:
        """This process's part of batch `step`."""
        planned = [self._plan.batch(step)[place] for place in self._places]
        size = self._plan.config.row
        arrays = {name: np.full((len(planned), size.tokens), IGNORED if name == "labels" else 0, np.int32) for name in _ARRAYS}
        views = (dict[str, Any](zip(_ARRAYS, lines, strict=True)) for lines in zip(*arrays.values(), strict=True))
        rows = [AssembledRow(**view, images=[], signals=[]) for view in views]
        faults = [fault for row, plan in zip(rows, planned, strict=True) for fault in self.assemble(row, plan)]
        records = sum(len({piece[:2] for piece in row.pieces}) for row in planned)
        return LocalBatch(_batch_of(arrays, rows, size, self._model), tuple(faults), records)

    def assemble(self, row: AssembledRow, planned: PlannedRow) -> list[Fault]:
        """Fills the arrays of a row, which are empty. What cannot be read leaves padding behind, and is returned."""
        faults = []
        for source, number, document, size in planned.misfits:
            name = f"{self._plan.sources[source].name(number)}, document {document}"
            faults.append(Fault(name, "too large for a row", str(size.misfit(self._plan.config.row))))
        start = 0
        for segment, piece in enumerate(planned.pieces, start=1):
            try:
                record = self._read(piece.source, piece.record)
                if piece.document is None:
                    row.put_media([medium for _, medium in record.media], self._model)
                    row.put_record(record)
                else:
                    self._put(row, start, segment, record, piece.document, piece.start, piece.stop, self._prefixes[piece.source])
            except ConfigError:
                raise  # the model is wrong for all documents of this kind, not the document for the model
            except (DataError, ValueError) as error:
                reason = str(getattr(error, "reason", "unusable record"))
                faults.append(Fault(self._plan.sources[piece.source].name(piece.record), reason, str(error)))
            start += piece.stop - piece.start
        return faults

    def _put(
        self, row: AssembledRow, at: int, segment: int, record: Record, document: int, start: int, stop: int, prefix: np.ndarray
    ) -> None:
        media = [medium for number, medium in record.media if number == document] if record.media else []
        row.put_media(media, self._model)  # before anything else is placed: a broken medium takes its document along
        first = int(record.lengths[:document].sum())
        place = slice(first, first + int(record.lengths[document]))
        ids, labels = record.ids[place], record.labels[place]
        if len(prefix):
            ids, labels = np.concatenate([prefix, ids]), np.concatenate([np.full(len(prefix), IGNORED, np.int32), labels])
        row.put(at, ids[start:stop], labels[start:stop], segment)

    def _read(self, source: int, number: int) -> Record:
        key = (source, number)
        if (kept := self._kept.get(key)) is not None:
            return kept
        record = self._plan.sources[source][number]
        if len(record.lengths) > 1 and not record.media:
            self._kept[key] = record
            while len(self._kept) > KEPT_RECORDS:
                self._kept.popitem(last=False)
        return record


class Batches:
    """The batches of a run, or this process's part of them: `batches[k]` for any k, fastest in order.

    Args:
      reader: makes them.
      plan: that the reader follows.
      reading: threads and read-ahead.
      steps: how many batches there may be asked for.

    Attributes:
      plan: which rows they have.
      quarantine: records that could not be used, and why.
    """

    def __init__(self, reader: RowReader, plan: BatchPlan, reading: ReadConfig, steps: int = 2**40):
        self._reader, self.plan, self._reading, self._steps = reader, plan, reading, steps
        self._iterator: Iterator[LocalBatch] | None = None
        self._next = -1
        self._counted: dict[int, Counts] = {}  # after each batch that was made and is not yet used
        self._before = Counts(0, {})  # what all processes had counted when the run was continued
        self.quarantine = Quarantine(plan.config.max_bad_share)

    def __getitem__(self, step: int) -> Batch:
        """Batch `step`, from 0.

        Raises:
          DataError: too large a share of the records cannot be used.
        """
        if step != self._next or self._iterator is None:
            self.close()
            self._iterator = self._iterate(step)
        local = next(self._iterator)
        self._next = step + 1
        self.quarantine.read(local.records, local.faults)
        self._counted[step + 1] = self.quarantine.counts
        return local.batch

    def close(self) -> None:
        """Ends reading ahead."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    def state(self, step: int) -> dict[str, Any]:
        """See `BatchPlan.state`; with what all processes have counted until then, who all call this."""
        return self.plan.state(step) | {"counts": self._counts(step)._asdict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `BatchPlan.restore`. Faults begin anew: a bad record that comes again in a later epoch is counted again."""
        self.close()
        self.plan.restore(state)
        self.quarantine = Quarantine(self.plan.config.max_bad_share)
        self._counted, self._before = {}, Counts(**state["counts"])

    def metrics(self, step: int) -> dict[str, float]:
        """For the run's log, after `step` batches: what all processes have read and could not use, and each source's share of the tokens
        so far. All processes call it."""
        shares = {f"data/share/{path}": share for path, share in self.plan.shares(step).items()}
        return self._counts(step).metrics() | shares

    def _counts(self, step: int) -> Counts:
        """Of all processes, after `step` batches."""
        for used in [number for number in list(self._counted) if number < step]:
            del self._counted[used]
        own = self._counted.get(step, Counts(0, {}))
        return functools.reduce(Counts.__add__, (Counts(*counts) for counts in gather(own)), self._before)

    def _iterate(self, start: int) -> Iterator[LocalBatch]:
        options = grain.ReadOptions(num_threads=self._reading.threads, prefetch_buffer_size=self._reading.ahead)
        data = grain.MapDataset.source(_Steps(start, self._steps)).map(self._reader).to_iter_dataset(options)
        if self._reading.processes:
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._reading.processes))
        return iter(data)


class _Steps:
    """The numbers of steps from `start` on."""

    def __init__(self, start: int, stop: int):
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> int:
        return self._start + index
