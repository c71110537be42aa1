"""Finds SMILES, protein and DNA/RNA in running text (spec 6, step 3), in time linear in the text.

The official class searches with a regular expression that tries every position anew and, at every `[`, looks for its `]` to the
end of the text. Here the length of the unit at every position is looked up at once, for all texts of a batch, and ten units in a row
are found by following positions: five gathers, whatever the text. A run that starts so is then read once.
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
from jaxtyping import Int, UInt8

from interns1pro_jax.tokenizer.smiles import AROMATIC, ONE_LETTER_ELEMENTS, TWO_LETTER_ELEMENTS, Check

# A SMILES run has ten units or more (`_possible_starts`).
_LEAST_RESIDUES = 27  # of a protein, DNA or RNA

# Bytes that stand for characters are ASCII; others are neither units nor letters.
_SEPARATOR = b"\x80"  # between texts
_OTHER = 0  # a character that is not ASCII, and an opening bracket without a closing one
_OPEN, _CLOSE = ord("["), ord("]")
_ONE_CHARACTER = ONE_LETTER_ELEMENTS + AROMATIC + "().=-#@$%*:+/\\0123456789"
_BAD_EDGES = b":.="  # characters that a run neither starts nor ends with


def _run_pattern() -> re.Pattern[bytes]:
    """A run of units. Of those that begin alike the longer is tried first; the order of the others is of how common they are."""
    capitals = sorted({element[0] for element in [*TWO_LETTER_ELEMENTS, *ONE_LETTER_ELEMENTS]}, key=lambda c: ("CNOFS".find(c) % 10, c))
    elements = []
    for first in capitals:
        seconds = "".join(element[1] for element in TWO_LETTER_ELEMENTS if element[0] == first)
        alone = "?+" if first in ONE_LETTER_ELEMENTS else ""
        elements.append(f"{first}[{seconds}]{alone}" if seconds else first)
    signs = re.escape("".join(character for character in _ONE_CHARACTER if not character.isupper()))
    return re.compile(rf"(?>[{signs}]++|{'|'.join(elements)}|\[[^\]]+\])++".encode())


_RUN = _run_pattern()
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
    found = list(_smiles(data, starts, texts, is_smiles))
    residues = list(_residues(data))
    spans: list[Span] = []
    text = end = 0
    for start, stop, kind in sorted(found + residues) if residues else found:
        # A run of capitals never crosses the border of a SMILES string, which no letter touches; it may lie inside one.
        if start >= end:
            text, end = _text_at(starts, start, text), stop
            spans.append(Span(text, start - starts[text], stop - starts[text], kind))
    return spans


def _text_at(starts: list[int], position: int, earliest: int) -> int:
    """The number of the text with this position, which is at least `earliest`."""
    return earliest if position < starts[earliest + 1] else bisect.bisect_right(starts, position, earliest) - 1


def _unit_tables() -> tuple[np.ndarray, np.ndarray]:
    """Whether a byte is a unit, and whether a pair is: [256], [256, 256]."""
    one = np.zeros(256, bool)
    one[list(_ONE_CHARACTER.encode())] = True
    two = np.zeros((256, 256), bool)
    for first, second in TWO_LETTER_ELEMENTS:
        two[ord(first), ord(second)] = True
    return one, two


_IS_UNIT, _IS_PAIR = _unit_tables()
_IS_BAD_EDGE = np.isin(np.arange(256), list(_BAD_EDGES))
_IS_LETTER = [chr(byte).isascii() and chr(byte).isalpha() for byte in range(256)]


@functools.cache
def _byte_of() -> UInt8[np.ndarray, " codes"]:
    """The byte that stands for each character of Unicode."""
    table = np.full(sys.maxunicode + 1, _OTHER, np.uint8)
    table[:128] = np.arange(128)
    table[[ord(digit) for digit in re.findall(r"[^\D0-9]", "".join(map(chr, range(len(table)))))]] = ord("0")
    return table


def _one_byte_each(text: str) -> bytes:
    """ASCII as it is, and any decimal digit as 0, which is a unit, whatever its script."""
    if text.isascii():
        return text.encode()
    return _byte_of()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].tobytes()


def _smiles(data: bytes, starts: list[int], texts: Sequence[str], is_smiles: Check) -> Iterator[tuple[int, int, Kind]]:
    """Accepted SMILES strings: where each starts and ends in `data`."""
    data, possible = _possible_starts(data, starts)
    end = text = 0
    for start in possible:
        if start < end:  # in a run that was read
            continue
        match = _RUN.match(data, start)
        assert match is not None  # it starts with ten units
        end = match.end()
        while data[end - 1] in _BAD_EDGES:
            end -= 1
        if (start and _IS_LETTER[data[start - 1]]) or (end < len(data) and _IS_LETTER[data[end]]):
            continue
        text = _text_at(starts, start, text)
        offset = starts[text]
        if is_smiles(texts[text][start - offset : end - offset]):
            yield start, end, Kind.SMILES


def _possible_starts(data: bytes, starts: list[int]) -> tuple[bytes, list[int]]:
    """The data without brackets that do not close within their text; and where ten units or more follow one another, of which
    neither the first character nor some later last one is a bad edge."""
    codes: UInt8[np.ndarray, " positions"] = np.frombuffer(data, np.uint8)
    none = len(codes) + 1
    ends = _unit_ends(codes, starts)
    lone = np.flatnonzero((codes == _OPEN) & (ends[: len(codes)] == none))
    if lone.size:
        codes = codes.copy()
        codes[lone] = _OTHER
        data = codes.tobytes()
    two = ends[ends]
    four = two[two]
    ten = two[four[four]]
    enough = np.flatnonzero(ten[: len(codes)] != none)
    if not enough.size:
        return data, []
    # After ten units, a run of bad edges is skipped: what follows it, if it is a unit, ends well.
    bad = _IS_BAD_EDGE[codes]
    good_at = np.append(np.flatnonzero(~bad), len(codes))
    next_good = good_at[np.append(0, np.cumsum(~bad))]  # at or after each position
    end = ten[enough]
    ends_well = ~bad[end - 1] | (ends[next_good[end]] != none)
    return data, enough[~bad[enough] & ends_well].tolist()


def _unit_ends(codes: UInt8[np.ndarray, " positions"], starts: list[int]) -> Int[np.ndarray, " positions_and_two"]:
    """Where the unit at each position ends; the number of positions plus one where none starts, or there is no position.

    Args:
      starts: of the texts, and the end of the last, separators counted. A bracket closes within its text.
    """
    none = len(codes) + 1
    ends = np.full(len(codes) + 2, none, np.int32 if none < 1 << 31 else np.int64)
    here = np.flatnonzero(_IS_UNIT[codes]).astype(ends.dtype)
    ends[here] = here + 1
    pairs = np.flatnonzero(_IS_PAIR[codes[:-1], codes[1:]]).astype(ends.dtype)
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


def _residues(data: bytes) -> Iterator[tuple[int, int, Kind]]:
    """Runs of capitals, long enough for a protein, or for DNA or RNA if there is no other letter than A, C, G, T and U."""
    for match in _RESIDUES.finditer(data):
        yield match.start(), match.end(), Kind.XNA if _BASES.fullmatch(match[0]) else Kind.PROTEIN
