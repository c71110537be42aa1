"""Laws of the order: shares exact at every moment, everything once before anything twice, a function of (seed, n) and nothing else."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.mixture import BLOCK, CurriculumStage, Mixture, Source, SourceSize
from interns1pro_jax.data.permutation import permute

SOURCES = [Source("web", 0.55), Source("code", 0.3), Source("protein", 0.1399), Source("rare", 0.0101)]
SIZES = [SourceSize(records, 4000 * records) for records in (10**9, 3 * 10**7, 997, 50)]


def make(sources=SOURCES, sizes=SIZES, **kwargs):
    return Mixture(sources, sizes, **kwargs)


def same(a, b):
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4096, 4097])
def test_a_permutation_is_one_and_depends_on_its_key(size):
    results = [permute(np.arange(size), size, key) for key in (1, 2)]
    assert all(np.array_equal(np.sort(result), np.arange(size)) for result in results)
    assert size < 16 or (results[0] != results[1]).mean() > 0.5
    assert permute(np.array([size - 1]), size, 1)[0] == results[0][-1]


def test_huge_permutations_collide_nowhere_and_spread():
    sizes = np.array([10**9, 2**40 + 1, 2**62])
    for size in sizes.tolist():
        index = np.unique(np.random.default_rng(0).integers(0, size, 200_000))
        out = permute(index, size, 7)
        assert len(np.unique(out)) == len(index) and out.min() >= 0 and out.max() < size
        histogram = np.bincount(out * 16 // size if size < 2**58 else out // (size // 16), minlength=16)[:16]
        assert abs(histogram / len(index) * 16 - 1).max() < 0.05
    mixed = permute(np.array([5, 5, 5]), sizes, 7)
    assert mixed.tolist() == [int(permute(np.array([5]), size, 7)[0]) for size in sizes.tolist()]
    with pytest.raises(ValueError, match="outside of its range"):
        permute(np.array([3]), 3, 0)


def test_the_permutation_of_a_key_is_what_it_always_was():
    """Checkpoints of running trainings rely on these numbers."""
    pinned = [453343770, 431481354, 238433108, 428362886, 588982195, 146739282, 757887521, 690842716]
    assert permute(np.arange(8), 10**9, 2024).tolist() == pinned


@pytest.mark.parametrize("start", [0, 12_345, 10**9 + 77, 10**12])
def test_every_window_of_draws_has_the_shares(start):
    mixture = make(seed=3)
    counts = np.bincount(mixture.draws(start, start + 10_000).source, minlength=4)
    wanted = 10_000 * np.array([{s.path: s.weight for s in SOURCES}[s.path] for s in mixture.sources])
    # The two blocks that the window cuts are the only ones that can deviate by more than rounding.
    assert abs(counts - wanted).max() < 0.01 * 10_000 and abs(counts - wanted).max() < BLOCK / 4
    aligned = start // BLOCK * BLOCK
    counts = np.bincount(mixture.draws(aligned, aligned + 40 * BLOCK).source, minlength=4)
    assert abs(counts - wanted / 10_000 * 40 * BLOCK).max() <= 2


def test_shares_are_exact_in_the_long_run():
    mixture = make()
    for n in (BLOCK, 10**6 // BLOCK * BLOCK, 10**15 // BLOCK * BLOCK):
        counts = mixture.counts(n)
        assert sum(counts) == n
        for source, count in zip(mixture.sources, counts, strict=True):
            assert abs(count - n * source.weight) <= 3 + 1e-9 * n


def test_weights_are_shares_of_tokens():
    sources = [Source("long", 1.0), Source("short", 1.0)]
    mixture = make(sources, [SourceSize(100, 100_000), SourceSize(1000, 10_000)])
    assert mixture.counts(101 * BLOCK) == (BLOCK, 100 * BLOCK)


def test_draws_do_not_depend_on_how_they_are_asked_for():
    mixture = make(seed=1, curriculum=[CurriculumStage(10**7, {"rare": 0.5})])
    whole = mixture.draws(0, 6000)
    cuts = [0, 1, 255, 256, 257, 999, 2304, 5999, 6000]
    parts = [mixture.draws(a, b) for a, b in itertools.pairwise(cuts)]
    for name in ("source", "epoch", "record"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    order = [2, 0, 3, 1]
    other = make([SOURCES[i] for i in order], [SIZES[i] for i in order], seed=1, curriculum=[CurriculumStage(10**7, {"rare": 0.5})])
    assert same(whole, other.draws(0, 6000))
    assert not np.array_equal(make(seed=2).draws(0, 6000).record, whole.record)


def test_nothing_comes_twice_before_everything_came_once():
    mixture = make()
    draws = mixture.draws(0, 30_000)
    for number, size in enumerate(mixture.sizes):
        mine = draws.source == number
        order = np.argsort(draws.epoch[mine], kind="stable")
        for epoch in range(int(draws.epoch[mine].max(initial=0)) + 1):
            records = draws.record[mine & (draws.epoch == epoch)]
            assert len(np.unique(records)) == len(records)
        if size.records < 300:
            first, second = (draws.record[mine & (draws.epoch == epoch)] for epoch in (0, 1))
            assert np.array_equal(np.sort(first), np.arange(size.records)) and not np.array_equal(first, second)
        assert order.size


def test_a_change_of_weights_leaves_what_was_before_it():
    base = [CurriculumStage(4 * 10**7, {"code": 0.1})]
    old, new = make(curriculum=base), make(curriculum=[*base, CurriculumStage(9 * 10**7, {"protein": 0.6})])
    first = new.stages[2].start
    assert new.stages[:2] == old.stages and first % BLOCK == 0 and first > 10_000
    assert same(old.draws(0, first), new.draws(0, first))
    assert not same(old.draws(first, first + 1000), new.draws(first, first + 1000))


def test_a_source_that_is_to_come_later_changes_nothing_before():
    sources = [*SOURCES, *(Source(f"new {i}", 0.0) for i in range(9))]
    old, new = (
        make(seed=4),
        make(sources, SIZES + [SourceSize(10, 10)] * 9, seed=4, curriculum=[CurriculumStage(9 * 10**7, {"new 3": 0.6})]),
    )
    first = new.stages[1].start
    a, b = old.draws(0, first), new.draws(0, first)
    assert [old.sources[i].path for i in a.source] == [new.sources[i].path for i in b.source]
    assert np.array_equal(a.record, b.record) and np.array_equal(a.epoch, b.epoch)


def test_a_curriculum_changes_weights_at_its_tokens():
    mixture = make(curriculum=[CurriculumStage(4 * 10**7, {"code": 0.0, "web": 0.85})])
    change = mixture.stages[1].start
    assert abs(change * 4000 - 4 * 10**7) < BLOCK * 4000
    before, after = mixture.draws(change - 2560, change), mixture.draws(change, change + 2560)
    code = [s.path for s in mixture.sources].index("code")
    assert abs((before.source == code).mean() - 0.3) < 0.01 and not (after.source == code).any()


def test_a_source_stops_at_its_limit_and_the_others_go_on():
    sources = [Source("a", 0.5, epochs=2.5), Source("b", 0.5, epochs=3), Source("c", 0.25, epochs=1)]
    mixture = make(sources, [SourceSize(100, 100), SourceSize(1000, 1000), SourceSize(77, 77)])
    assert mixture.length == 250 + 3000 + 77
    draws = mixture.draws(0, mixture.length)
    assert Counter(draws.source.tolist()) == {0: 250, 1: 3000, 2: 77}
    assert all((np.bincount(draws.record[draws.source == s]) >= 2).all() for s in (0, 1))
    # The remaining sources share what the exhausted one leaves.
    assert [round(r, 3) for r in mixture.stages[-1].rates] == [0, 1, 0]
    with pytest.raises(ConfigError, match=r"ends after 3,327 draws.*every source has reached its epochs"):
        mixture.draws(3000, 3328)


def test_impossible_mixtures_are_refused():
    with pytest.raises(ConfigError, match="each once"):
        make([Source("a", 1), Source("a", 1)], SIZES[:2])
    with pytest.raises(ConfigError, match=r"weight=-1"):
        Source("a", -1)
    with pytest.raises(ConfigError, match=r"epochs=0"):
        Source("a", 1, epochs=0)
    with pytest.raises(ConfigError, match="has no records"):
        make([Source("a", 1)], [SourceSize(0, 0)])
    with pytest.raises(ConfigError, match="all weights"):
        make([Source("a", 0)], SIZES[:1])
    with pytest.raises(ConfigError, match=r"names \['d'\]"):
        make(curriculum=[CurriculumStage(5, {"d": 1})])
    with pytest.raises(ConfigError, match="growing numbers"):
        make(curriculum=[CurriculumStage(5, {}), CurriculumStage(5, {})])
