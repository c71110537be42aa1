"""Laws of the plan: every token in exactly one row, no row above its size, media never cut, rows nearly full."""

from collections import defaultdict

import numpy as np
import pytest

from interns1pro_jax.data.packing import COLUMNS, RowSize, attention_cost, misfits, plan_rows

ROW = RowSize(100, patches=40, samples=500, signal_rows=50, signal_pairs=20, patch_width=8)


def make_sizes(count: int) -> np.ndarray:
    generator = np.random.default_rng(count)
    sizes = []
    for index in range(count):
        tokens = int(generator.integers(1, 60))
        match index % 4:
            case 0:
                sizes.append(RowSize(int(generator.choice([1, 30, 99, 100, 101, 200, 201, 350]))))
            case 1:
                sizes.append(RowSize(tokens, patches=int(generator.integers(1, 41))))
            case 2:
                sizes.append(RowSize(tokens, 0, 100, int(generator.integers(1, 51)), int(generator.integers(1, 11)) * 2, 8))
            case 3:
                sizes.append(RowSize(tokens, 20, 300, 20, 4, 2))
    return np.stack([size.as_array() for size in sizes])


def plan(sizes, row=ROW, seed=0):
    return plan_rows(sizes, row, np.random.default_rng(seed).permutation(len(sizes)))


@pytest.mark.parametrize("count", [1, 5, 400])
def test_every_token_is_in_exactly_one_row_and_no_row_overflows(count):
    sizes = make_sizes(count)
    found = plan(sizes)
    seen = defaultdict(list)
    for number in range(len(found)):
        pieces = found.row(number)
        assert pieces.stop > pieces.start
        used, lengths = np.zeros(5, np.int64), []
        for document, start, stop in zip(found.document[pieces], found.start[pieces], found.stop[pieces], strict=True):
            seen[int(document)].append((int(start), int(stop)))
            used += [stop - start, *sizes[document, 1:5]]
            lengths.append(stop - start)
        assert (used <= ROW.as_array()[:5]).all()
        assert found.costs[number] == attention_cost(lengths)
    assert sorted(seen) == list(range(count))
    for document, pieces in seen.items():
        pieces.sort()
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == sizes[document, 0]
        if sizes[document, 1:].any() or sizes[document, 0] <= ROW.tokens:
            assert len(pieces) == 1


def test_rows_are_full():
    generator = np.random.default_rng(0)
    text = generator.integers(1, 60, 2000)[:, None]
    assert text.sum() / (len(plan(text)) * ROW.tokens) > 0.995
    mixed = make_sizes(4000)
    mixed = np.concatenate([mixed, np.pad(generator.integers(1, 60, (4000, 1)), ((0, 0), (0, 5)))])
    # Pictures and signals exhaust their budgets first; text fills the rest.
    assert mixed[:, 0].sum() / (len(plan(mixed)) * ROW.tokens) > 0.98


def test_text_alone_needs_no_columns_of_media():
    sizes = make_sizes(400)[::4]
    narrow, wide = plan(sizes[:, :1]), plan(sizes)
    assert np.array_equal(narrow.document, wide.document) and np.array_equal(narrow.offsets, wide.offsets)


def test_the_plan_is_a_function_of_its_arguments():
    sizes = make_sizes(200)
    assert np.array_equal(plan(sizes).document, plan(sizes.copy()).document)
    assert not np.array_equal(plan(sizes).document, plan(sizes, seed=1).document)


def test_what_cannot_fit_is_named():
    assert RowSize(1000).misfit(ROW) is None
    assert RowSize(100, 40, 500, 50, 20, 8).misfit(ROW) is None
    assert "tokens 101 > 100, patches 41 > 40" in RowSize(101, patches=41).misfit(ROW)
    assert "patch_width 9 > 8" in RowSize(10, 0, 10, 2, 2, 9).misfit(ROW)
    with pytest.raises(ValueError, match="document 1 is too large for a row: patches 41 > 40"):
        plan(np.stack([RowSize(5).as_array(), RowSize(10, patches=41).as_array()]))


def test_misfits_of_a_table_are_those_of_its_lines():
    sizes = np.random.default_rng(1).integers(0, 2, (300, 6)) * np.random.default_rng(2).integers(0, 130, (300, 6))
    sizes[:, 0] += 1
    ours = misfits(sizes, ROW).tolist()
    assert ours == [i for i, line in enumerate(sizes.tolist()) if RowSize(**dict(zip(COLUMNS, line, strict=True))).misfit(ROW)]
    assert 0 < len(ours) < 300
