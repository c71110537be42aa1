"""Random permutations of huge ranges without memory: where an index goes is computed, not stored.

A Feistel network permutes [0, 4^h), the smallest such range that holds the wanted one; an index that lands outside is sent through
again until it lands inside. All arithmetic is on arrays, so a batch of draws costs some microseconds.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_KEYS = tuple(np.uint64(number * _GOLDEN % 2**64) for number in range(1, 7))


def key_of(*parts: int | str) -> int:
    """A 64-bit key of names and numbers; it depends on nothing but them (Python's own `hash` changes between processes)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit moves half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_hash(key: int, counters: Int[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Independent random words for numbered things: a function of the key and the number."""
    return mix(np.asarray(counters).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def permute(index: Int[np.ndarray, " N"], size: Int[np.ndarray, " N"] | int, key: UInt64[np.ndarray, " N"] | int) -> Int[np.ndarray, " N"]:
    """Where `index` stands in the permutation of [0, size) that `key` names: for one size and key a bijection.

    Args:
      index: in [0, size).
      size: of the range, up to 2**62; one for all or one for each index.
      key: 64 bits; one for all or one for each index.

    Raises:
      ValueError: an index outside of its range.
    """
    x, sizes, keys = (np.asarray(a, np.uint64) for a in np.broadcast_arrays(np.asarray(index, np.int64), size, np.asarray(key, np.uint64)))
    if (x >= sizes).any():
        raise ValueError("an index to permute lies outside of its range.")
    half = np.maximum((_bit_length(sizes - np.uint64(1)) + np.uint64(1)) >> np.uint64(1), np.uint64(1))
    out = _feistel(x, half, keys)
    outside = np.flatnonzero(out >= sizes)
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], keys[outside])
        outside = outside[out[outside] >= sizes[outside]]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (mix((right + round_key) ^ keys) & mask)
    return (left << half) | right


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Bits of each word; `log2` of a word above 2**53 may be one off, so it is checked."""
    guess = np.floor(np.log2(np.maximum(x, np.uint64(1)).astype(np.float64))).astype(np.uint64) + np.uint64(1)
    guess = guess - (x >> (guess - np.uint64(1)) == 0)
    return guess.astype(np.uint64)
