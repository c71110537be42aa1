"""Laws of dealing: every row once, batches that do not depend on the ranks, equal cost for all of them."""

import numpy as np
import pytest

from interns1pro_jax.data.balance import deal, spread

COSTS = np.random.default_rng(0).uniform(0.05, 1, 64 * 16) ** 2


@pytest.mark.parametrize(("window", "ranks"), [(1, 1), (1, 8), (4, 8), (16, 64)])
def test_every_row_has_one_place(window, ranks):
    places = deal(COSTS[: 64 * window], 64, ranks, key=1)
    assert places.shape == (window, 64)
    assert np.array_equal(np.sort(places.ravel()), np.arange(64 * window))


def test_batches_have_the_same_rows_for_any_number_of_ranks():
    results = [np.sort(deal(COSTS, 64, ranks, key=1), axis=1) for ranks in (1, 4, 64)]
    assert all(np.array_equal(results[0], result) for result in results)
    assert not np.array_equal(np.sort(deal(COSTS, 64, 4, key=2), axis=1), results[0])


def test_a_window_of_one_batch_keeps_the_batch():
    for batch in COSTS.reshape(16, 64):
        assert np.array_equal(np.sort(deal(batch, 64, 8, key=0)[0]), np.arange(64))


@pytest.mark.parametrize(("window", "ranks", "bound"), [(1, 8, 0.1), (4, 8, 0.05), (16, 64, 0.3)])
def test_ranks_wait_less(window, ranks, bound):
    windows = COSTS.reshape(-1, window * 64)
    dealt = np.concatenate([costs[deal(costs, 64, ranks, key=5)] for costs in windows])
    as_they_come = spread(COSTS.reshape(-1, 64), ranks)
    assert spread(dealt, ranks) < bound < as_they_come / 2
    assert spread(np.ones((3, 8)), 4) == 0 and spread(np.array([[3.0, 1.0]]), 2) == 0.5


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 rows do not make batches of 4"):
        deal(COSTS[:10], 4, 2, key=0)
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        deal(COSTS[:8], 4, 3, key=0)
