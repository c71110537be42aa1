"""Laws of the plan: every token in exactly one row, no row above its size, media never cut, order from the seed alone."""

from collections import defaultdict

import numpy as np
import pytest

from interns1pro_jax.data.packing import RowSize, plan_rows

ROW = RowSize(100, patches=40, samples=500, signal_rows=50, signal_pairs=20, patch_width=8)


def make_sizes(count: int) -> dict[int, RowSize]:
    generator = np.random.default_rng(count)
    sizes = {}
    for index in range(count):
        tokens = int(generator.integers(1, 60))
        match index % 4:
            case 0:
                sizes[7 * index] = RowSize(int(generator.choice([1, 30, 99, 100, 101, 200, 201, 350])))
            case 1:
                sizes[7 * index] = RowSize(tokens, patches=int(generator.integers(1, 41)))
            case 2:
                sizes[7 * index] = RowSize(tokens, 0, 100, int(generator.integers(1, 51)), int(generator.integers(1, 11)) * 2, 8)
            case 3:
                sizes[7 * index] = RowSize(tokens, 20, 300, 20, 4, 2)
    return sizes


@pytest.mark.parametrize("count", [1, 5, 400])
def test_every_token_is_in_exactly_one_row_and_no_row_overflows(count):
    sizes = make_sizes(count)
    seen = defaultdict(list)
    for row in plan_rows(sizes, ROW, seed=3):
        assert row
        used = np.zeros(5, np.int64)
        for piece in row:
            seen[piece.document].append((piece.start, piece.stop))
            need = sizes[piece.document].additive()
            need[0] = piece.stop - piece.start
            used += need
        assert (used <= ROW.additive()).all()
    assert seen.keys() == sizes.keys()
    for document, pieces in seen.items():
        pieces.sort()
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == sizes[document].tokens
        assert all(start < stop for start, stop in pieces)
        if not sizes[document].text_only or sizes[document].tokens <= ROW.tokens:
            assert len(pieces) == 1


def test_rows_are_well_filled():
    generator = np.random.default_rng(0)
    sizes = {index: RowSize(int(n)) for index, n in enumerate(generator.integers(1, 60, 2000))}
    rows = plan_rows(sizes, ROW, seed=0)
    assert sum(size.tokens for size in sizes.values()) / (len(rows) * ROW.tokens) > 0.97


def test_the_plan_is_a_function_of_its_arguments():
    sizes = make_sizes(100)
    plan = plan_rows(sizes, ROW, seed=1)
    assert plan == plan_rows(dict(reversed(sizes.items())), ROW, seed=1)
    assert plan != plan_rows(sizes, ROW, seed=2)


def test_what_cannot_fit_is_named():
    assert RowSize(1000).misfit(ROW) is None
    assert RowSize(100, 40, 500, 50, 20, 8).misfit(ROW) is None
    assert "tokens 101 > 100, patches 41 > 40" in RowSize(101, patches=41).misfit(ROW)
    assert "patch_width 9 > 8" in RowSize(10, 0, 10, 2, 2, 9).misfit(ROW)
    with pytest.raises(ValueError, match="document 4 is too large for a row: patches 41 > 40"):
        plan_rows({4: RowSize(10, patches=41)}, ROW, seed=0)


def test_the_first_rows_are_a_fair_sample():
    sizes = {index: RowSize(150 if index % 2 else 10) for index in range(2000)}
    cut = [len(row) == 1 for row in plan_rows(sizes, ROW, seed=0)]
    assert 0.5 < np.mean(cut) < 0.7
    assert abs(np.mean(cut[: len(cut) // 4]) - np.mean(cut)) < 0.08
