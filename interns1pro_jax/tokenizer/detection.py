"""Finds SMILES, protein and DNA/RNA in running text (spec 6, step 3), in time linear in the text.

The official class searches with a regular expression that tries every position anew and, at every `[`, looks for its `]` to the
end of the text. Here the length of the unit at every position is looked up at once, for all texts of a batch, and ten units in a row
are found by following positions: five gathers, whatever the text.
"""

from __future__ import annotations

import bisect
import enum
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from interns1pro_jax.tokenizer.smiles import AROMATIC, ONE_LETTER_ELEMENTS, TWO_LETTER_ELEMENTS, Check

# A SMILES run has ten units or more (`_starts_a_run`).
_LEAST_RESIDUES = 27  # of a protein, DNA or RNA

_SEPARATOR = b"\0"  # between texts; no unit, no letter
_OPEN, _CLOSE = ord("["), ord("]")
_ONE_CHARACTER = ONE_LETTER_ELEMENTS + AROMATIC + "().=-#@$%*:+/\\0123456789"
# Units without brackets. A run is followed by this pattern between brackets, from where it was found.
_UNITS = re.compile(rf"(?>{'|'.join(TWO_LETTER_ELEMENTS)}|[{re.escape(_ONE_CHARACTER)}])*+".encode())
_RESIDUES = re.compile(rb"(?<![A-Z])[A-Z]{%d,}" % _LEAST_RESIDUES)
_BASES = re.compile(rb"[ACGTU]+")


class Kind(enum.IntEnum):
    """What a span holds, and so which segment model encodes it."""

    SMILES = 0
    PROTEIN = 1
    XNA = 2


class Span(NamedTuple):
    """Characters `start` to `end` of the text number `text`."""

    text: int
    start: int
    end: int
    kind: Kind


def find(texts: Sequence[str], is_smiles: Check) -> list[Span]:
    """The spans of all texts, in order; they do not overlap.

    Args:
      is_smiles: whether a run of ten or more units is accepted.
    """
    data = _SEPARATOR.join(map(_one_byte_each, texts))
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)]).tolist()
    spans: list[Span] = []
    for start, kind, end in sorted([*_smiles(data, starts, texts, is_smiles), *_residues(data)]):
        # A run of capitals never crosses the border of a SMILES string, which no letter touches; it may lie inside one.
        text = bisect.bisect_right(starts, start) - 1
        offset = starts[text]
        if not spans or (text, start - offset) >= (spans[-1].text, spans[-1].end):
            spans.append(Span(text, start - offset, end - offset, kind))
    return spans


def _unit_tables() -> tuple[np.ndarray, np.ndarray]:
    """Whether a byte is a unit, and whether a pair is: [256], [256, 256]."""
    one = np.zeros(256, bool)
    one[list(_ONE_CHARACTER.encode())] = True
    two = np.zeros((256, 256), bool)
    for first, second in TWO_LETTER_ELEMENTS:
        two[ord(first), ord(second)] = True
    return one, two


_IS_UNIT, _IS_PAIR = _unit_tables()
_BAD_EDGE = np.isin(np.arange(256), list(b":.="))  # characters that a run neither starts nor ends with


@functools.cache
def _byte_of() -> UInt8[np.ndarray, " codes"]:
    """The byte that stands for each character of Unicode."""
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    table[:128] = np.arange(128)
    table[[ord(digit) for digit in re.findall(r"[^\D0-9]", "".join(map(chr, range(len(table)))))]] = ord("0")
    return table


def _one_byte_each(text: str) -> bytes:
    """ASCII as it is, any decimal digit as 0 (which is a unit, whatever its script), other characters as the separator."""
    if text.isascii():
        return text.encode()
    return _byte_of()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].tobytes()


def _smiles(data: bytes, starts: list[int], texts: Sequence[str], is_smiles: Check) -> Iterator[tuple[int, Kind, int]]:
    """Accepted SMILES strings: where each starts and ends in `data`."""
    after = 0
    following = unit_ends(data, starts)
    viable = np.flatnonzero(_starts_a_run(data, following)).tolist()
    index = 0
    while (index := bisect.bisect_left(viable, after, index)) < len(viable):
        start = viable[index]
        after = end = _end_of_run(data, following, start)
        text = bisect.bisect_right(starts, start) - 1
        offset, last = starts[text], starts[text + 1] - 1
        touches = (start > offset and _is_letter(data[start - 1])) or (end < last and _is_letter(data[end]))
        if not touches and is_smiles(texts[text][start - offset : end - offset]):
            yield start, Kind.SMILES, end


def unit_ends(data: bytes, starts: list[int]) -> Int[np.ndarray, " positions_and_one"]:
    """Where the unit at each position ends; the number of positions plus one where none starts, or there is no position.

    Args:
      starts: of the texts in `data`, and the end of the last, separators counted. A bracket closes within its text.
    """
    codes = np.frombuffer(data, np.uint8)
    none = len(codes) + 1
    ends = np.full(len(codes) + 2, none, np.int32)
    here = np.flatnonzero(_IS_UNIT[codes]).astype(np.int32)
    ends[here] = here + 1
    pairs = np.flatnonzero(_IS_PAIR[codes[:-1], codes[1:]]).astype(np.int32)
    ends[pairs] = pairs + 2
    opens = np.flatnonzero(codes == _OPEN)
    if opens.size:
        stops = codes == _CLOSE
        stops[np.array(starts[1:-1], np.int64) - 1] = True  # separators
        passed = np.cumsum(stops)[opens]  # the stops before each opening bracket
        stop_at = np.append(np.flatnonzero(stops), len(codes))[passed]
        closes = np.append(codes, 0)[stop_at] == _CLOSE
        filled = stop_at > opens + 1  # `[]` is no unit
        good = closes & filled
        ends[opens[good]] = stop_at[good] + 1
    return ends


def _starts_a_run(data: bytes, ends: Int[np.ndarray, " positions_and_one"]) -> Bool[np.ndarray, " positions"]:
    """Where ten units or more follow one another, of which neither the first character nor some later last one is a bad edge."""
    codes: UInt8[np.ndarray, " positions"] = np.frombuffer(data, np.uint8)
    none = len(codes) + 1
    two = ends[ends]
    four = two[two]
    ten = two[four[four]]
    enough = np.flatnonzero(ten[: len(codes)] != none)
    result = np.zeros(len(codes), bool)
    # After ten units, a run of bad edges is skipped: what follows it, if it is a unit, ends well.
    bad = _BAD_EDGE[codes]
    good_at = np.append(np.flatnonzero(~bad), len(codes))
    next_good = good_at[np.append(0, np.cumsum(~bad))]  # at or after each position
    end = ten[enough]
    ends_well = ~bad[end - 1] | (ends[next_good[end]] != none)
    result[enough] = ~bad[enough] & ends_well
    return result


def _end_of_run(data: bytes, ends: Int[np.ndarray, " positions_and_one"], start: int) -> int:
    """The last position that a run from `start` can end at."""
    none = len(data) + 1
    at = start
    while True:
        match = _UNITS.match(data, at)
        assert match is not None  # it matches the empty string
        at = match.end()
        if at >= len(data) or ends[at] == none:
            break
        at = int(ends[at])
    while _BAD_EDGE[data[at - 1]]:
        at -= 1
    return at


def _is_letter(byte: int) -> bool:
    return 65 <= byte <= 90 or 97 <= byte <= 122


def _residues(data: bytes) -> Iterator[tuple[int, Kind, int]]:
    """Runs of capitals, long enough for a protein, or for DNA or RNA if there is no other letter than A, C, G, T and U."""
    for match in _RESIDUES.finditer(data):
        yield match.start(), Kind.XNA if _BASES.fullmatch(match[0]) else Kind.PROTEIN, match.end()
