"""Cuts are the best there are, every expert is copied as often as the others, and the methods do what they say."""

import itertools

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.expansion.assignment import METHODS, ExpansionConfig, assign, pair_weights, separation
from interns1pro_jax.expansion.cuts import climb, cut_value, distinct_cuts
from interns1pro_jax.expansion.routing_counts import RoutingCounts, count_routing
from tests.tiny import text_only


def symmetric(experts: int, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).exponential(size=(experts, experts)) ** 3
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    return weights


def routing(tokens: int = 400, layers: int = 2, experts: int = 16, chosen: int = 8, seed: int = 0) -> np.ndarray:
    """Experts of tokens, best first; low ids are chosen more often, and neighbours together."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(layers, tokens, experts)) + np.roll(rng.gumbel(size=(layers, tokens, experts)), 1, -1)
    return np.argsort(-(scores - 0.1 * np.arange(experts)), -1)[..., :chosen].astype(np.uint8)


COUNTS = count_routing(routing(), np.ones(400, bool), experts=16, depth=2)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_best_cut_is_the_best_of_all(parts):
    experts = 8
    weights = symmetric(experts, seed=parts)
    balanced = set(itertools.permutations(np.repeat(np.arange(parts), experts // parts).tolist()))
    best = max(cut_value(weights, np.array(c)) for c in balanced)
    cuts = distinct_cuts(weights, parts, 3, seed=0)
    values = [cut_value(weights, cut) for cut in cuts]
    assert values[0] == pytest.approx(best)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("parts", [2, 3])
def test_an_ascent_ends_where_no_swap_gains(parts):
    weights = symmetric(12, seed=parts)
    start = np.arange(12) % parts
    cut = climb(weights, start)
    reached = cut_value(weights, cut)
    assert reached > cut_value(weights, start)
    for one, other in itertools.combinations(range(12), 2):
        swapped = cut.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert cut_value(weights, swapped) <= reached * (1 + 1e-12)


@pytest.mark.parametrize(("experts", "parts", "count", "different"), [(16, 2, 8, 8), (4, 2, 8, 3), (6, 1, 2, 1)])
def test_cuts_are_balanced_and_differ_as_long_as_there_are_more(experts, parts, count, different):
    cuts = distinct_cuts(symmetric(experts, seed=1), parts, count, seed=0)
    assert len(cuts) == count
    assert len({tuple(cut) for cut in cuts}) == different
    assert all(set(np.bincount(cut)) == {experts // parts} for cut in cuts)


def test_counts_are_those_of_the_valid_tokens_one_by_one_and_add_up():
    ids, valid = routing(tokens=50), np.arange(50) % 3 > 0
    counts = count_routing(ids, valid, 16, depth=3)
    ranks, pairs = np.zeros((2, 16, 8), int), np.zeros((2, 16, 16), int)
    for layer, token in itertools.product(range(2), np.flatnonzero(valid)):
        chosen = ids[layer, token].tolist()
        for rank, expert in enumerate(chosen):
            ranks[layer, expert, rank] += 1
        for one, other in itertools.permutations(chosen[:3], 2):
            pairs[layer, one, other] += 1
    np.testing.assert_array_equal(counts.ranks_LEK, ranks)
    np.testing.assert_array_equal(counts.pairs_LEE, pairs)
    halves = [count_routing(ids[:, part], valid[part], 16, depth=3) for part in (slice(0, 20), slice(20, 50))]
    assert (halves[0] + halves[1]).fingerprint == counts.fingerprint != COUNTS.fingerprint
    assert counts.tokens == valid.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("growth", "groups"), [(4, 8), (2, 8), (8, 8), (1, 8)])
def test_every_expert_is_copied_equally_often_and_a_seed_gives_one_result(method, growth, groups):
    config = ExpansionConfig(growth=growth, groups=groups, method=method)
    config.target(text_only(num_experts=16, router_n_groups=1))
    slots = assign(config, 2, 16, COUNTS)
    assert slots.shape == (2, groups, 16 * growth // groups)
    assert (np.apply_along_axis(np.bincount, 1, slots.reshape(2, -1)) == growth).all()
    np.testing.assert_array_equal(slots, assign(config, 2, 16, COUNTS))


def test_pairs_keeps_apart_what_is_chosen_together():
    slots = {method: assign(ExpansionConfig(method=method), 2, 16, COUNTS) for method in METHODS}
    apart = {method: separation(COUNTS, slots[method]).min() for method in METHODS}
    assert apart["pairs"] > max(apart["random"], apart["copy"])
    # By hand, for one layer: of each of the four copies, the pairs of experts in different halves.
    pairs = COUNTS.pairs_LEE[0]
    halves = [np.isin(np.arange(16), slots["pairs"][0, group]) for group in (0, 2, 4, 6)]
    cut = [pairs[half][:, ~half].sum() * 2 / pairs.sum() for half in halves]
    assert separation(COUNTS, slots["pairs"])[0] == pytest.approx(np.mean(cut))
    assert len({half.tobytes() for half in halves}) == 4
    # No group without well-trained experts: each half has its share of the Top-1 choices.
    first = COUNTS.ranks_LEK[0, :, 0] / COUNTS.tokens
    assert all(0.3 < first[half].sum() < 0.7 for half in halves)
    assert (np.diag(pair_weights(COUNTS, 0)) == 0).all()


def test_ranked_gives_every_rank_its_group():
    slots = assign(ExpansionConfig(method="ranked"), 2, 16, COUNTS)
    assert (slots[..., :2] == slots[..., 2:4]).all()  # all copies of an expert in one group
    mean_rank = (COUNTS.ranks_LEK[0] * np.arange(8)).sum(-1) / COUNTS.ranks_LEK[0].sum(-1)
    of_group = mean_rank[slots[0]].mean(-1)
    assert of_group[:4].mean() < of_group[4:].mean()
    hits = sum(COUNTS.ranks_LEK[0, slots[0, g, :2], g].sum() for g in range(8))
    rng = np.random.default_rng(0)
    assert all(hits >= sum(COUNTS.ranks_LEK[0, p, i // 2].sum() for i, p in enumerate(rng.permutation(16))) for _ in range(200))


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        (dict(method="best"), {}, r"method='best' is unknown; use one of pairs, ranked, random, copy"),
        (
            dict(growth=3, method="copy"),
            dict(num_experts=12),
            r"growth \* experts = 3 \* 12=36 must be divisible by ExpansionConfig.groups=8",
        ),
        (dict(growth=3), dict(num_experts=16), "groups=8 must be divisible by growth=3"),
        (dict(growth=8, method="ranked"), dict(num_experts=12), "experts of the source=12 must be divisible by groups"),
        (dict(method="ranked"), dict(num_experts_per_tok=4), "the source activates 4 experts"),
        (dict(), dict(router_n_groups=8), "8 groups already"),
        (dict(), dict(num_experts=0), "no MoE layers"),
        (dict(experts_per_token=12), {}, "num_experts_per_tok=12 must be divisible by router_n_groups=8"),
        (dict(noise=float("nan")), {}, "noise=nan"),
    ],
)
def test_what_cannot_grow_is_named(options, source, message):
    with pytest.raises(ConfigError, match=message):
        ExpansionConfig(**options).target(text_only(**{"num_experts": 16, "router_n_groups": 1, **source}))


def test_counts_of_another_model_or_none_are_named():
    with pytest.raises(ConfigError, match="pairs needs routing counts"):
        assign(ExpansionConfig(), 2, 16, None)
    with pytest.raises(ConfigError, match="2 MoE layers with 16 experts, the source has 3 with 16"):
        assign(ExpansionConfig(), 3, 16, COUNTS)
    with pytest.raises(ConfigError, match="no tokens"):
        assign(ExpansionConfig(), 2, 16, RoutingCounts(COUNTS.ranks_LEK * 0, COUNTS.pairs_LEE * 0, 2))
    with pytest.raises(ConfigError, match=r"9 distinct experts .* activates only 8"):
        count_routing(routing(), np.ones(400, bool), 16, depth=9)
