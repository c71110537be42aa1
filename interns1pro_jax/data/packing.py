"""Plans which documents share a row. A plan is a list, so row r is found without reading what comes before it.

Documents are placed whole. Only a text longer than a row is cut, into full rows and a rest that is packed like a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from interns1pro_jax.models.time_series_inputs import TimeSeriesSizes

# Rows open at a time. More fill rows slightly better and take longer to search (with 64 the demo's rows of 256 tokens are 0.98 full).
_OPEN_ROWS = 64


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
        return self.patches == self.samples == 0

    def additive(self) -> np.ndarray:
        """The quantities that add up, as a vector."""
        return np.array([self.tokens, self.patches, self.samples, self.signal_rows, self.signal_pairs], np.int64)

    def misfit(self, row: RowSize) -> str | None:
        """Why a document of this size can never be in a row of that size; None if it can."""
        wants, has = dataclasses.asdict(self), dataclasses.asdict(row)
        short = [f"{name} {wants[name]} > {has[name]}" for name in wants if wants[name] > has[name]]
        if self.text_only and row.tokens > 0:
            return None  # a long text is cut
        return f"too large for a row: {', '.join(short)}; make rows larger or the document smaller." if short else None


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document; all of it unless the document was cut."""

    document: int
    start: int
    stop: int


Row = tuple[Piece, ...]


def plan_rows(sizes: Mapping[int, RowSize], row: RowSize, seed: int) -> list[Row]:
    """Packs documents, given their sizes, in an order drawn from `seed`: first fit into a bounded number of open rows.

    Every token of every document is in exactly one row. The rows come in random order, so that the first few are a fair sample.
    The plan depends on nothing but the arguments.

    Raises:
      ValueError: a document that cannot be in any row; ask `RowSize.misfit` beforehand.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.array(sorted(sizes), np.int64))
    rows: list[Row] = []
    open_rows: list[list[Piece]] = []
    room = np.zeros((0, len(row.additive())), np.int64)
    for document in order.tolist():
        size = sizes[document]
        if reason := size.misfit(row):
            raise ValueError(f"document {document} is {reason}")
        full = (size.tokens - 1) // row.tokens  # above 0 for long texts only
        rows += [(Piece(document, i * row.tokens, (i + 1) * row.tokens),) for i in range(full)]
        rest = Piece(document, full * row.tokens, size.tokens)
        need = size.additive()
        need[0] = rest.stop - rest.start
        fits = np.flatnonzero((room >= need).all(axis=1))
        if fits.size:
            place = int(fits[0])
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = int(room[:, 0].argmin())
                rows.append(tuple(open_rows.pop(fullest)))
                room = np.delete(room, fullest, axis=0)
            place = len(open_rows)
            open_rows.append([])
            room = np.concatenate([room, row.additive()[None]])
        open_rows[place].append(rest)
        room[place] -= need
    rows += [tuple(pieces) for pieces in open_rows]
    return [rows[index] for index in generator.permutation(len(rows))]
