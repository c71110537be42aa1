"""Balanced partitions of experts that keep those which are chosen together apart: maximum cuts with parts of equal size.

Exact maximum cuts are NP-hard; steepest ascent over swaps of two experts, from random starts, is what the sizes here need: hundreds of
experts per layer, tens of layers, milliseconds each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.config_checks import check_divides

_RESTARTS = 32


def cut_value(weights_EE: Float[np.ndarray, "E E"], parts_E: Int[np.ndarray, " E"]) -> float:
    """Sum of the weights between experts of different parts, each pair once. `weights_EE` is symmetric with a diagonal of zeros."""
    return float(weights_EE[parts_E[:, None] != parts_E].sum() / 2)


def climb(weights_EE: Float[np.ndarray, "E E"], parts_E: Int[np.ndarray, " E"]) -> Int[np.ndarray, " E"]:
    """Swaps the two experts whose exchange gains most until none gains; the sizes of the parts stay."""
    parts_E = parts_E.copy()
    count = int(parts_E.max()) + 1
    experts = np.arange(len(parts_E))
    # What counts as a gain: beyond the rounding of the sums, so that the ascent ends.
    least = 1e-9 * (np.abs(weights_EE).sum() + 1)
    while True:
        to_part_EP = weights_EE @ np.eye(count)[parts_E]
        inside_E = to_part_EP[experts, parts_E]
        to_others_EE = to_part_EP[:, parts_E]  # [i, j]: weight between i and the part of j
        gain_EE = inside_E[:, None] + inside_E - to_others_EE - to_others_EE.T + 2 * weights_EE
        gain_EE[parts_E[:, None] == parts_E] = 0
        first, second = np.unravel_index(np.argmax(gain_EE), gain_EE.shape)
        if gain_EE[first, second] <= least:
            return parts_E
        parts_E[[first, second]] = parts_E[[second, first]]


def distinct_cuts(weights_EE: Float[np.ndarray, "E E"], parts: int, count: int, seed: int) -> Int[np.ndarray, "count E"]:
    """`count` different cuts into `parts` equal parts, best first.

    They are the best local optima of many ascents; where these are fewer, swaps of two experts of the cuts before. Only where fewer
    partitions exist at all do cuts repeat, in turn. Parts are numbered in the order of their first experts.

    Raises:
      ConfigError: the experts do not divide into equal parts.
    """
    experts = len(weights_EE)
    check_divides("experts of the source", experts, "groups that share a copy", parts)
    rng = np.random.default_rng(seed)
    level_E = np.repeat(np.arange(parts), experts // parts)
    optima: dict[bytes, np.ndarray] = {}
    for _ in range(max(_RESTARTS, 4 * count)):
        cut = _numbered(climb(weights_EE, rng.permutation(level_E)))
        optima[cut.tobytes()] = cut
    found = _best(weights_EE, optima, count)
    existing = math.factorial(experts) // (math.factorial(experts // parts) ** parts * math.factorial(parts))
    while len(found) < min(count, existing):
        swapped = {near.tobytes(): near for cut in found.values() for near in _swaps(cut) if near.tobytes() not in found}
        found |= _best(weights_EE, swapped, count - len(found))
    chosen = list(_best(weights_EE, found, count).values())
    return np.stack([chosen[i % len(chosen)] for i in range(count)])


def random_cuts(experts: int, parts: int, count: int, seed: int) -> Int[np.ndarray, "count E"]:
    """`count` random partitions into equal parts.

    Raises:
      ConfigError: the experts do not divide into equal parts.
    """
    check_divides("experts of the source", experts, "groups that share a copy", parts)
    rng = np.random.default_rng(seed)
    return np.stack([_numbered(rng.permutation(np.repeat(np.arange(parts), experts // parts))) for _ in range(count)])


def _best(weights_EE: np.ndarray, cuts: Mapping[bytes, np.ndarray], count: int) -> dict[bytes, np.ndarray]:
    return dict(sorted(cuts.items(), key=lambda item: (-cut_value(weights_EE, item[1]), item[0]))[:count])


def _swaps(parts_E: np.ndarray) -> Iterator[np.ndarray]:
    for pair in np.argwhere(parts_E[:, None] < parts_E):
        swapped = parts_E.copy()
        swapped[pair] = swapped[pair[::-1]]
        yield _numbered(swapped)


def _numbered(parts_E: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(parts_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
