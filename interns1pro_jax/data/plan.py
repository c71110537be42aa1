"""Which rows the batches of a run have: a pure function of the mixture, the seed and the step.

Every process plans the whole global batch, from tables of sizes and without reading a record, and then reads the rows of its own
devices. So no process needs to know of another, and their number may change between any two steps.

    RowsPlan       rows that were packed beforehand: row n of the run is draw n of the mixture. Any step is found in constant time.
    DocumentsPlan  documents packed on the way: blocks of draws are packed, block by block. How many rows a block gives is known only when
                   it is planned, so the place of a step is a cursor of two integers, which a checkpoint holds.

Both deal the rows of a window of steps to the ranks by attention cost (`balance`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.balance import deal
from interns1pro_jax.data.mixture import BLOCK, Mixture, Stage
from interns1pro_jax.data.packing import COLUMNS, RowSize, misfits, plan_rows
from interns1pro_jax.data.permutation import counter_hash, key_of
from interns1pro_jax.data.records import DataError
from interns1pro_jax.data.sources import DOCUMENTS, ROWS, PreparedSource

_CHUNK = 4096  # draws of packed rows that are found together
_KEPT_CURSORS = 4096  # of windows; a checkpoint asks for a recent one
# Records of several documents that a reader keeps at a time. A block of more would have them read again and again.
KEPT_RECORDS = 512


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What decides the batches, beside the mixture.

    Attributes:
      row: static size of a row; its `tokens` is the sequence length.
      batch_size: rows in a batch.
      seed: of all orders.
      window: steps whose rows are sorted by attention cost before they are dealt to the ranks; 1 keeps each batch as it comes.
      block: draws that are packed together, where documents are packed on the way. Rows at the end of a block are not full, so it should
        give a hundred rows or more.
      max_bad_share: share of unusable records beyond which the run stops.
    """

    row: RowSize
    batch_size: int = 8
    seed: int = 0
    window: int = 1
    block: int = 4096
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if min(self.row.tokens, self.batch_size, self.window, self.block) < 1:
            raise ConfigError(
                f"row.tokens={self.row.tokens}, batch_size={self.batch_size}, window={self.window} and block={self.block} must be positive."
            )
        if self.row.signal_pairs % 2:
            raise ConfigError(f"row.signal_pairs={self.row.signal_pairs} must be even: two pairs make a token.")


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document, its system prompt included; `document` is None for all documents of a record."""

    source: int
    record: int
    document: int | None = None
    start: int = 0
    stop: int = 0


class Misfit(NamedTuple):
    """A document that no row has room for."""

    source: int
    record: int
    document: int
    size: RowSize


class PlannedRow(NamedTuple):
    """What a row is made of, and its attention cost. The first row of a block also names the block's documents that fit nowhere."""

    pieces: tuple[Piece, ...]
    cost: float
    misfits: tuple[Misfit, ...] = ()


class BatchPlan(abc.ABC):
    """Common to both plans. Safe to use from several threads; can be pickled.

    Args:
      mixture: the order of draws.
      sources: in the order of `mixture.sources`.
      config: sizes.
      ranks: data-parallel ranks that a batch is dealt to.
      prefixes: tokens of each source's system prompt.
    """

    def __init__(self, mixture: Mixture, sources: Sequence[PreparedSource], config: PipelineConfig, ranks: int, prefixes: Sequence[int]):
        if config.batch_size % ranks:
            raise ConfigError(f"batch_size={config.batch_size} must divide over the {ranks} data-parallel ranks of the mesh.")
        self.mixture, self.sources, self.config, self.ranks, self.prefixes = mixture, sources, config, ranks, prefixes
        self._lock = threading.RLock()
        self._windows: dict[int, list[list[PlannedRow]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _windows={})

    def batch(self, step: int) -> list[PlannedRow]:
        """The rows of batch `step`, from 0, in their places."""
        number, within = divmod(step, self.config.window)
        with self._lock:
            if number not in self._windows:
                self._windows = {n: rows for n, rows in self._windows.items() if abs(n - number) <= 1}
                rows = self._window_rows(number)
                key = key_of(self.config.seed, "window", number)
                places = deal(np.array([row.cost for row in rows]), self.config.batch_size, self.ranks, key)
                self._windows[number] = [[rows[row] for row in batch] for batch in places.tolist()]
            return self._windows[number][within]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` batches has to hold: the place in the data, and what all draws up to there depend on."""
        used = self._drawn(step)
        stages = [self._describe(stage) for stage in self.mixture.stages if stage.start < used]
        sources = {source.path: prepared.manifest.fingerprint for source, prepared in zip(self.mixture.sources, self.sources, strict=True)}
        return {"step": step, "cursor": self._cursor(step), "drawn": used, "stages": stages, "sources": sources}

    def shares(self, step: int) -> dict[str, float]:
        """Each source's share of the tokens of the draws that the first `step` batches have come from, by its path."""
        used = self._drawn(step)
        used = used if self.mixture.length is None else min(used, self.mixture.length)
        whole = used // BLOCK * BLOCK
        counts = np.array(self.mixture.counts(whole)) + np.bincount(
            self.mixture.draws(whole, used).source, minlength=len(self.mixture.sources)
        )
        tokens = counts * np.array([size.tokens / size.records for size in self.mixture.sizes])
        shares = (tokens / max(tokens.sum(), 1)).tolist()
        return {source.path: share for source, share in zip(self.mixture.sources, shares, strict=True)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          DataError: the mixture would have been another one before that, or a source has changed.
        """
        used = state["drawn"]
        for stage, saved in zip(self.mixture.stages, state["stages"], strict=False):
            if self._describe(stage) != saved:
                raise DataError(
                    f"the mixture differs from draw {min(stage.start, saved['start']):,} on from the checkpoint's, but {used:,} draws have "
                    "been used: weights may only change later. Add a stage to the curriculum instead of changing what was."
                )
        later = [stage.start for stage in self.mixture.stages[len(state["stages"]) :]]
        if len(self.mixture.stages) < len(state["stages"]) or (later and later[0] < used):
            raise DataError(
                f"{used:,} draws have been used, but the stages of the mixture now begin at {[s.start for s in self.mixture.stages]}: "
                "stages of the curriculum may only be added after what has been drawn."
            )
        known = {source.path: p.manifest.fingerprint for source, p in zip(self.mixture.sources, self.sources, strict=True)}
        changed = [path for path, fingerprint in state["sources"].items() if known.get(path, fingerprint) != fingerprint]
        if changed:
            raise DataError(f"the sources {changed} are not the ones of the checkpoint; put them back, or choose another workdir.")
        self._set_cursor(state["step"], state["cursor"])

    def _describe(self, stage: Stage) -> dict[str, Any]:
        """A stage by the paths of its sources, without those that take no part: they may be added and removed."""
        paths = [source.path for source in self.mixture.sources]
        return {
            "start": stage.start,
            "rates": {path: rate for path, rate in zip(paths, stage.rates, strict=True) if rate},
            "counts": {path: count for path, count in zip(paths, stage.counts, strict=True) if count},
        }

    @abc.abstractmethod
    def _window_rows(self, number: int) -> list[PlannedRow]:
        """The rows of a window of batches, before they are dealt."""

    @abc.abstractmethod
    def _drawn(self, step: int) -> int:
        """Draws that the windows of the first `step` batches depend on: all before this one."""

    @abc.abstractmethod
    def _cursor(self, step: int) -> dict[str, int]:
        """What finds the window of batch `step`, beside its number."""

    @abc.abstractmethod
    def _set_cursor(self, step: int, cursor: Mapping[str, int]) -> None:
        """Takes over what `_cursor` gave."""


class RowsPlan(BatchPlan):
    """Batches of rows that were packed beforehand."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._chunk = functools.lru_cache(maxsize=4)(self._plan_chunk)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_chunk"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._chunk = functools.lru_cache(maxsize=4)(self._plan_chunk)

    def _window_rows(self, number: int) -> list[PlannedRow]:
        wanted = self.config.window * self.config.batch_size
        first, last = number * wanted, (number + 1) * wanted
        rows: list[PlannedRow] = []
        for chunk in range(first // _CHUNK, -(-last // _CHUNK)):
            rows += self._chunk(chunk)[max(first - chunk * _CHUNK, 0) : last - chunk * _CHUNK]
        if len(rows) < wanted:
            self.mixture.draws(first, last)  # raises, and says that the mixture has ended
        return rows

    def _plan_chunk(self, number: int) -> list[PlannedRow]:
        """The rows of consecutive draws: many, since what finding them costs is the same for few."""
        stop = (number + 1) * _CHUNK
        end = stop if self.mixture.length is None else min(stop, self.mixture.length)
        draws = self.mixture.draws(min(number * _CHUNK, end), end)
        costs = np.empty(len(draws))
        for source in np.unique(draws.source).tolist():
            mine = draws.source == source
            costs[mine] = self.sources[source].costs[draws.record[mine]]
        planned = zip(draws.source.tolist(), draws.record.tolist(), costs.tolist(), strict=True)
        return [PlannedRow((Piece(source, record),), cost) for source, record, cost in planned]

    def _drawn(self, step: int) -> int:
        return -(-step // self.config.window) * self.config.window * self.config.batch_size

    def _cursor(self, step: int) -> dict[str, int]:
        return {}

    def _set_cursor(self, step: int, cursor: Mapping[str, int]) -> None:
        """Any step is found from its number."""


class DocumentsPlan(BatchPlan):
    """Batches of documents that are packed on the way."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._cursors: dict[int, tuple[int, int]] = {0: (0, 0)}  # block and row where each window begins
        self._block = functools.lru_cache(maxsize=4)(self._plan_block)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_block"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._block = functools.lru_cache(maxsize=4)(self._plan_block)

    def _window_rows(self, number: int) -> list[PlannedRow]:
        block, row = self._begin(number)
        wanted = self.config.window * self.config.batch_size
        rows: list[PlannedRow] = []
        while len(rows) < wanted:
            planned = self._block(block)
            taken = planned[row : row + wanted - len(rows)]
            rows += taken
            row += len(taken)
            if row == len(planned):
                block, row = block + 1, 0
        self._remember(number + 1, (block, row))
        return rows

    def _begin(self, number: int) -> tuple[int, int]:
        """The cursor of a window; one that has not been planned yet is reached by counting the rows of the blocks before it."""
        while number not in self._cursors:
            last = max(n for n in self._cursors if n < number)
            block, row = self._cursors[last]
            row += self.config.window * self.config.batch_size
            while row >= (rows := len(self._block(block))):
                block, row = block + 1, row - rows
            self._remember(last + 1, (block, row))
        return self._cursors[number]

    def _remember(self, number: int, cursor: tuple[int, int]) -> None:
        self._cursors[number] = cursor
        if len(self._cursors) > _KEPT_CURSORS:
            self._cursors = {n: kept for n, kept in self._cursors.items() if n == 0 or abs(n - number) < _KEPT_CURSORS // 2}

    def _drawn(self, step: int) -> int:
        with self._lock:
            block, row = self._begin(-(-step // self.config.window))
        return (block + (row > 0)) * self.config.block

    def _cursor(self, step: int) -> dict[str, int]:
        with self._lock:
            block, row = self._begin(step // self.config.window)
        return {"window": step // self.config.window, "block": block, "row": row}

    def _set_cursor(self, step: int, cursor: Mapping[str, int]) -> None:
        with self._lock:
            self._cursors[cursor["window"]] = (cursor["block"], cursor["row"])

    def _plan_block(self, number: int) -> list[PlannedRow]:
        """The rows of a block of draws, in random order."""
        row = self.config.row
        draws = self.mixture.draws(number * self.config.block, (number + 1) * self.config.block)
        columns = len(COLUMNS) if any(source.sizes.shape[1] > 1 for source in self.sources) else 1
        parts, owners = [], []
        for index in np.unique(draws.source).tolist():
            source, mine = self.sources[index], np.flatnonzero(draws.source == index)
            first, last = (np.asarray(source.offsets[draws.record[mine] + end]) for end in (0, 1))
            counts = last - first
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            lines = np.zeros((len(inside), columns), np.int64)
            lines[:, : source.sizes.shape[1]] = source.sizes[np.repeat(first, counts) + inside]
            lines[:, 0] += self.prefixes[index]
            parts.append(lines)
            owners.append(np.stack([np.full(len(inside), index), np.repeat(draws.record[mine], counts), inside], axis=1))
        sizes, owner = np.concatenate(parts), np.concatenate(owners)
        bad = misfits(sizes, row)
        left_out = tuple(
            Misfit(source, record, document, RowSize(*sizes[i].tolist()))
            for i, (source, record, document) in zip(bad.tolist(), owner[bad].tolist(), strict=True)
        )
        sizes, owner = np.delete(sizes, bad, axis=0), np.delete(owner, bad, axis=0)
        if not len(sizes):
            raise DataError(f"no document of draws {number * self.config.block:,} and following fits into {row}; make rows larger.")
        key = key_of(self.config.seed, "packing", number)
        plan = plan_rows(sizes, row, counter_hash(key, np.arange(len(sizes))).argsort(kind="stable"))
        owned = owner[plan.document].tolist()
        pieces = [
            Piece(source, record, document, start, stop)
            for (source, record, document), start, stop in zip(owned, plan.start.tolist(), plan.stop.tolist(), strict=True)
        ]
        order = counter_hash(key_of(self.config.seed, "rows", number), np.arange(len(plan))).argsort(kind="stable").tolist()
        rows = [PlannedRow(tuple(pieces[plan.row(index)]), float(plan.costs[index])) for index in order]
        rows[0] = rows[0]._replace(misfits=left_out)
        return rows


def make_plan(
    mixture: Mixture, sources: Sequence[PreparedSource], config: PipelineConfig, ranks: int, prefixes: Sequence[int]
) -> BatchPlan:
    """The plan for sources of one kind.

    Raises:
      ConfigError: sources of both kinds, or a system prompt that cannot be put before the documents.
    """
    kinds = {source.manifest.kind for source in sources}
    if len(kinds) > 1:
        names = {kind: [s.directory for s in sources if s.manifest.kind == kind] for kind in (DOCUMENTS, ROWS)}
        raise ConfigError(f"a mixture is of packed rows or of documents, not of both: {names}; prepare one of the two again.")
    for source, prepared in zip(mixture.sources, sources, strict=True):
        if source.system_prompt and prepared.manifest.kind == ROWS:
            raise ConfigError(f"{source.path} holds packed rows; give its system prompt to tools.prepare_data --system instead.")
        if source.system_prompt and prepared.manifest.own_system:
            raise ConfigError(
                f"{prepared.manifest.own_system} documents of {source.path} have a system message of their own; leave out "
                "Source.system_prompt, or prepare the source without them."
            )
        chunks = prepared.manifest.kind == DOCUMENTS and prepared.manifest.documents > 2 * len(prepared)
        if chunks and config.block > KEPT_RECORDS:
            raise ConfigError(
                f"{source.path} has {prepared.manifest.documents // len(prepared)} documents in a record, so that "
                f"PipelineConfig.block={config.block} draws would not fit the memory of a reader; set it to {KEPT_RECORDS} or less."
            )
    return (RowsPlan if kinds == {ROWS} else DocumentsPlan)(mixture, sources, config, ranks, prefixes)
