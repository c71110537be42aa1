"""Plans which documents share a row, from their sizes alone.

Documents are placed whole. Only a text longer than a row is cut, into full rows and a rest that is packed like a document.
Images, videos and signals have budgets of their own beside the tokens, so a row of pictures is filled up with text.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.models.time_series_inputs import TimeSeriesSizes

# Columns of size tables: what adds up over the documents of a row, then the bound of the patch width.
COLUMNS = ("tokens", "patches", "samples", "signal_rows", "signal_pairs", "patch_width")
_ADDITIVE = 5


@dataclasses.dataclass(frozen=True)
class RowSize:
    """What a document needs of a row, or what a row has. All but `patch_width` add up over the documents of a row.

    Attributes:
      tokens: sequence length.
      patches: vision patches.
      samples: values of signals, over all channels.
      signal_rows, signal_pairs: rows and patch pairs of signals (see `models.inputs.TimeSeriesInputs`).
      patch_width: the longest signal patch; it grows with the sampling rate (spec 4.1).
    """

    tokens: int
    patches: int = 0
    samples: int = 0
    signal_rows: int = 0
    signal_pairs: int = 0
    patch_width: int = 0

    @property
    def time_series(self) -> TimeSeriesSizes:
        return TimeSeriesSizes(self.samples, self.signal_rows, self.signal_pairs, self.patch_width)

    @property
    def text_only(self) -> bool:
        return not any(dataclasses.astuple(self)[1:])

    def as_array(self) -> Int[np.ndarray, " columns"]:
        """A line of a size table."""
        return np.array([getattr(self, name) for name in COLUMNS], np.int64)

    def misfit(self, row: RowSize) -> str | None:
        """Why a document of this size can never be in a row of that size; None if it can."""
        wants, has = dataclasses.asdict(self), dataclasses.asdict(row)
        short = [f"{name} {wants[name]} > {has[name]}" for name in wants if wants[name] > has[name]]
        if self.text_only and row.tokens > 0:
            return None  # a long text is cut
        return f"too large for a row: {', '.join(short)}; make rows larger or the document smaller." if short else None


def misfits(sizes: Int[np.ndarray, "D columns"], row: RowSize) -> Int[np.ndarray, " misfits"]:
    """The lines of a size table that can never be in such a row; see `RowSize.misfit`."""
    beyond = sizes > row.as_array()[: sizes.shape[1]]
    media = (sizes[:, 1:] > 0).any(1)
    return np.flatnonzero(beyond[:, 1:].any(1) | (media & beyond[:, 0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which pieces of documents a row has, row after row.

    Attributes:
      document, start, stop: tokens start..stop-1 of a document: all of it, unless it was cut.
      offsets: pieces offsets[r]..offsets[r+1]-1 are row r's.
      costs: of the rows' attention: the sum of the squared lengths of their pieces.
    """

    document: Int[np.ndarray, " P"]
    start: Int[np.ndarray, " P"]
    stop: Int[np.ndarray, " P"]
    offsets: Int[np.ndarray, " rows_and_one"]
    costs: Float[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> slice:
        """The pieces of a row."""
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))


def attention_cost(lengths: Sequence[int] | Int[np.ndarray, " documents"]) -> float:
    """Attention of documents that do not see one another, relative to others: the sum of their squared lengths."""
    return float(np.square(np.asarray(lengths, np.float64)).sum())


def plan_rows(sizes: Int[np.ndarray, "D columns"], row: RowSize, order: Int[np.ndarray, " D"]) -> Plan:
    """Packs documents, given their sizes: large before small, each into the fullest row that has room.

    Every token of every document is in exactly one row. The plan depends on nothing but the arguments.

    Args:
      sizes: a line for each document, in the columns of `COLUMNS`, or in the first of them where there are no media.
      order: of documents that need equal parts of a row.

    Raises:
      ValueError: a document that cannot be in any row; see `misfits` beforehand.
    """
    if (bad := misfits(sizes, row)).size:
        line = dict(zip(COLUMNS, sizes[bad[0]].tolist(), strict=False))
        raise ValueError(f"document {bad[0]} is {RowSize(**line).misfit(row)}")
    full = np.maximum(sizes[:, 0] - 1, 0) // row.tokens
    needs = sizes[:, :_ADDITIVE].copy()
    needs[:, 0] -= full * row.tokens
    has = row.as_array()[: needs.shape[1]]
    part = (needs / np.maximum(has, 1)).max(1)
    # Media lie between the texts that need a row of their own and those that fill up what media leave.
    media = (needs[:, 1:] > 0).any(1)
    turn = np.where(media, 1, np.where(2 * needs[:, 0] > row.tokens, 0, 2))
    by_part = np.lexsort((order, -part, turn))
    row_of = np.empty(len(needs), np.int64)
    row_of[by_part] = _best_fit(needs[by_part], has)
    rows = int(row_of.max(initial=-1)) + 1

    # Pieces: the rests in their rows, then the rows that a cut text fills alone.
    cut = np.repeat(np.arange(len(sizes)), full)
    begin = (np.arange(len(cut)) - np.repeat(np.cumsum(full) - full, full)) * row.tokens
    document = np.concatenate([np.arange(len(sizes)), cut])
    start = np.concatenate([full * row.tokens, begin])
    stop = np.concatenate([sizes[:, 0], begin + row.tokens])
    place = np.concatenate([row_of, rows + np.arange(len(cut))])
    rows += len(cut)
    by_row = np.argsort(place, kind="stable")
    document, start, stop, place = (x[by_row] for x in (document, start, stop, place))
    costs = np.bincount(place, np.square((stop - start).astype(np.float64)), minlength=rows)
    return Plan(document, start, stop, np.searchsorted(place, np.arange(rows + 1)), costs)


def _best_fit(needs: Int[np.ndarray, "D columns"], has: Int[np.ndarray, " columns"]) -> list[int]:
    """The row of each document, in the order given: of the rows with room for it the one with the fewest tokens left, else a new one."""
    rows: list[int] = []
    # Rows by tokens left; a full one is never looked at again. Python's lists find and move entries of this size faster than NumPy.
    left: list[int] = []
    ids: list[int] = []
    media = has.shape[0] > 1
    room: list[list[int]] | None = [] if media else None
    opened = 0
    for need in needs.tolist():
        tokens = need[0]
        place = bisect.bisect_left(left, tokens)
        if room is not None and any(need[1:]):
            while place < len(left) and any(n > r for n, r in zip(need[1:], room[ids[place]], strict=True)):
                place += 1
        if place < len(left):
            remaining, number = left.pop(place) - tokens, ids.pop(place)
        else:
            remaining, number = int(has[0]) - tokens, opened
            opened += 1
            if room is not None:
                room.append(has[1:].tolist())
        if room is not None:
            room[number] = [r - n for r, n in zip(room[number], need[1:], strict=True)]
        rows.append(number)
        if remaining:
            place = bisect.bisect_left(left, remaining)
            left.insert(place, remaining)
            ids.insert(place, number)
    return rows
