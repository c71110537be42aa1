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
      order: of documents that need similar parts of a row.

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
    # Large before small, but in random order within a factor of four: it fills rows as well, and rows of one kind of document are rare.
    by_size = np.lexsort((order, -np.floor(np.log2((needs / np.maximum(has, 1)).max(1)) / 2)))
    media = (needs[by_size, 1:] > 0).any(1)
    large = 2 * needs[by_size, 0] > row.tokens
    row_of = np.empty(len(needs), np.int64)
    # Media lie between the texts that need a row of their own and those that fill up what media leave.
    first, between, last = by_size[~media & large], by_size[media], by_size[~media & ~large]
    left: list[int] = []
    row_of[first] = _place_texts(needs[first, 0].tolist(), row.tokens, left)
    room = np.tile(has, (len(left), 1))
    room[:, 0] = left
    row_of[between], room = _place_media(needs[between], has, room)
    row_of[last] = _place_texts(needs[last, 0].tolist(), row.tokens, room[:, 0].tolist())
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


def _place_texts(tokens: Sequence[int], capacity: int, left: list[int]) -> list[int]:
    """The row of each text, in the order given: of the rows with room for it the one with the fewest tokens left, else a new one.

    Args:
      left: tokens left in the rows there are; afterwards, in all rows.
    """
    rows: list[int] = []
    # Rows by tokens left. Python's lists find and move entries of this number faster than NumPy.
    order = sorted(range(len(left)), key=left.__getitem__)
    sizes = [left[row] for row in order]
    for need in tokens:
        place = bisect.bisect_left(sizes, need)
        if place < len(sizes):
            remaining, row = sizes.pop(place) - need, order.pop(place)
        else:
            remaining, row = capacity - need, len(left)
            left.append(capacity)
        left[row] = remaining
        rows.append(row)
        if remaining:
            place = bisect.bisect_left(sizes, remaining)
            sizes.insert(place, remaining)
            order.insert(place, row)
    return rows


def _place_media(
    needs: Int[np.ndarray, "D columns"], has: Int[np.ndarray, " columns"], room: Int[np.ndarray, "rows columns"]
) -> tuple[list[int], Int[np.ndarray, "all_rows columns"]]:
    """As `_place_texts`, of documents that need several things; also returns the room that is left in all rows."""
    rows: list[int] = []
    used = len(room)
    room = np.concatenate([room, np.tile(has, (len(needs), 1))])  # at most a new row for each
    for need in needs:
        fits = np.flatnonzero((room[:used] >= need).all(1))
        row = int(fits[room[fits, 0].argmin()]) if fits.size else used
        used += row == used
        room[row] -= need
        rows.append(row)
    return rows, room[:used]
