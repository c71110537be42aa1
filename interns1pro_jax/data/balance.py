"""Gives every data-parallel rank rows of nearly equal attention cost (training_serving_evaluation.md 1.12).

The costs of a window of several batches are known before any row is read. The rows of the window are sorted by cost and cut into its
batches, so that what runs at the same time costs alike; within a batch each rank gets rows that add up to nearly the same. A window
of one batch leaves the batches as they come and only deals their rows to the ranks.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.data.permutation import counter_hash


def deal(costs: Float[np.ndarray, " window_rows"], batch_size: int, ranks: int, key: int) -> Int[np.ndarray, "batches batch_size"]:
    """Which row of a window is at which place of which batch.

    The rows of rank r are at places r*batch_size/ranks and following. Which rows make up a batch does not depend on `ranks`.

    Args:
      costs: of the rows of a whole number of batches.
      key: of the order of the batches.

    Raises:
      ValueError: rows that do not divide into batches, or batches that do not divide over ranks.
    """
    if len(costs) % batch_size or batch_size % ranks:
        raise ValueError(f"{len(costs)} rows do not make batches of {batch_size}, or a batch does not divide over {ranks} ranks.")
    batches = len(costs) // batch_size
    if batches == 1:
        rows = np.arange(batch_size)[None]
    else:
        # Batches of equal cost after another would be a schedule of its own, so their order is random.
        order = counter_hash(key, np.arange(batches)).argsort(kind="stable")
        rows = np.argsort(-costs, kind="stable").reshape(batches, batch_size)[order]
    return np.stack([batch[_deal_batch(costs[batch], ranks)] for batch in rows])


def _deal_batch(costs: np.ndarray, ranks: int) -> np.ndarray:
    """The order of a batch's rows: in rounds from the dearest to the cheapest, each round's dearest to the rank with the least so far."""
    rounds = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    places = np.empty((ranks, len(rounds)), np.int64)
    load = np.zeros(ranks)
    for number, rows in enumerate(rounds):
        by_load = np.argsort(load, kind="stable")
        places[by_load, number] = rows
        load[by_load] += costs[rows]
    return places.ravel()


def spread(costs: Float[np.ndarray, "batches batch_size"], ranks: int) -> float:
    """How much longer than the mean rank the dearest one takes, in the mean over batches: the share of attention time that others wait."""
    loads = costs.reshape(len(costs), ranks, -1).sum(-1)
    return float((loads.max(1) / loads.mean(1) - 1).mean())
