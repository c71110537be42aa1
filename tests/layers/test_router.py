"""Identities of the grouped router and its straight-through estimator (spec 1.2, 2.4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import RouterConfig
from interns1pro_jax.layers import router
from interns1pro_jax.layers.router import Router
from interns1pro_jax.ops.router_losses import balance_loss, global_topk_balance_loss, z_loss
from pallas_kernels.chips import CHIPS
from pallas_kernels.routing_reference import CHUNK, observe_unselected, route_reference
from tests.tiny import text_config

PLAIN = RouterConfig(straight_through=False)


def route(config, x, valid=None, **kwargs):
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return jax.jit(lambda x, valid, kwargs: Router(config, rngs=nnx.Rngs(1))(x, valid_BT=valid, **kwargs))(x, valid, kwargs)


@pytest.fixture
def x(mesh):
    return jax.random.normal(jax.random.key(0), (2, 5, 32))


@pytest.mark.parametrize(("groups", "chosen", "norm"), [(8, 8, True), (4, 8, True), (4, 8, False), (1, 3, True)])
def test_choice_and_weights_by_definition(x, groups, chosen, norm):
    config = text_config(router_n_groups=groups, num_experts_per_tok=chosen, norm_topk_prob=norm)
    routing, _, logits = route(config, x)
    p = np.asarray(jax.nn.softmax(logits, -1)).reshape(2, 5, groups, -1)
    ids = np.argsort(-p, -1, kind="stable")[..., : chosen // groups]
    np.testing.assert_array_equal(routing.ids_BTGC, ids)
    weights = np.take_along_axis(p, ids, -1)
    weights = weights / weights.sum((-2, -1), keepdims=True) if norm else weights
    np.testing.assert_allclose(routing.weights_BTGC, weights, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_straight_through_forward_is_bit_equal(x, temperature):
    config = text_config(router=RouterConfig(temperature=temperature))
    with_ste, without = (route(c, x)[0] for c in (config, dataclasses.replace(config, router=PLAIN)))
    assert (np.asarray(with_ste.weights_BTGC) == np.asarray(without.weights_BTGC)).all()
    assert (np.asarray(with_ste.ids_BTGC) == np.asarray(without.ids_BTGC)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("replayed", [False, True])
def test_straight_through_gradient_is_that_of_the_dense_softmax(x, temperature, replayed):
    """(b) gradients over the logits sum to zero, (c) they equal the surrogate's, (d) unselected rows get some, (e) replay too."""
    config = text_config(router=RouterConfig(temperature=temperature))
    replay = jax.random.randint(jax.random.key(5), (2, 5, 8, 1), 0, 4).astype(jnp.uint8) if replayed else None
    routing, _, logits = route(config, x, replay_BTGC=replay)
    if replayed:
        np.testing.assert_array_equal(routing.ids_BTGC, replay)
    routing, logits = jax.tree.map(np.asarray, (routing, logits))
    upstream = jax.random.normal(jax.random.key(7), routing.weights_BTGC.shape)

    def through_router(logits):
        router = Router(config, rngs=nnx.Rngs(1))
        router.logits = lambda *_: logits
        return (router(x, valid_BT=jnp.ones((2, 5), bool), replay_BTGC=replay)[0].weights_BTGC * upstream).sum()

    def surrogate(logits):
        p = jax.nn.softmax(logits / temperature, -1).reshape(2, 5, 8, 4)
        return (jnp.take_along_axis(p, routing.ids_BTGC, -1) * upstream).sum()

    gradient = np.asarray(jax.jit(jax.grad(through_router))(logits))
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(surrogate))(logits), atol=1e-6)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)
    hot = np.asarray(routing.ids_BTGC[..., 0][..., None] == jnp.arange(4)).reshape(2, 5, 32)
    assert (np.abs(gradient[~hot]) > 0).all()


def test_plain_gradient_misses_unselected_experts(x):
    config = text_config(router=PLAIN)

    def weights(logits):
        router = Router(config, rngs=nnx.Rngs(1))
        router.logits = lambda *_: logits
        return (router(x, valid_BT=jnp.ones((2, 5), bool))[0].weights_BTGC ** 2).sum()

    routing, _, logits = route(config, x)
    hot = np.asarray(routing.ids_BTGC[..., 0][..., None] == jnp.arange(4)).reshape(2, 5, 32)
    gradient = np.asarray(jax.jit(jax.grad(weights))(logits))
    np.testing.assert_allclose(gradient[~hot], 0, atol=1e-8)
    assert np.abs(gradient[hot]).max() > 1e-3


@pytest.mark.parametrize("tokens", [2 * CHUNK, CHUNK + 1])
def test_rows_are_routed_as_all_tokens_one_after_the_other(mesh, tokens):
    """Whether or not they are whole chunks, of which the counts are."""
    logits, upstream = (jax.random.normal(jax.random.key(i), (2, tokens, 16)) for i in range(2))
    options = dict(groups=8, chosen=1)
    upstream = upstream.reshape(2, tokens, 8, 2)[..., :1]

    def weights(logits, probe):
        routing = router.route_tokens(logits, None, probe, **options)
        return routing.weights_BTGC, routing

    def weights_by_definition(logits, probe):
        routes = route_reference(logits.reshape(-1, 16), None, probe, **options)
        return routes.probs_TGC.reshape(upstream.shape), routes

    def gradients(function, probe):
        def loss(logits, probe):
            weights, routes = function(logits, probe)
            return (weights * upstream).sum(), routes

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(logits, probe)

    (found_gradients, found), (gradients_by_definition, wanted) = (
        gradients(weights, router.probes(1)[0]),
        gradients(weights_by_definition, jnp.float32(0)),
    )
    np.testing.assert_array_equal(found.ids_BTGC.reshape(-1, 8, 1), wanted.ids_TGC)
    np.testing.assert_array_equal(found.ranks_BTGC.reshape(-1, 8, 1), wanted.ranks_TGC)
    np.testing.assert_array_equal(found.counts_NE, wanted.counts_NE)
    for got, gradient in zip(found_gradients, gradients_by_definition, strict=True):
        np.testing.assert_allclose(got.squeeze(), gradient.squeeze(), rtol=1e-5, atol=1e-7)


def test_probe_reports_the_squared_gradient_outside_the_selection(mesh):
    logits, selected = jnp.arange(6.0), jnp.array([True, False, True, False, False, True])
    upstream = jnp.array([1.0, 2, 3, 4, 5, 6])
    gradient, probe = jax.grad(lambda z, p: (observe_unselected(z, selected, p) * upstream).sum(), (0, 1))(logits, jnp.float32(0))
    np.testing.assert_array_equal(gradient, upstream)
    assert probe == 4 + 16 + 25


def test_statistics_ignore_padding(x):
    valid = jnp.array([[True] * 5, [True, True, False, False, False]])
    stats, first, second = (route(text_config(), *args)[1].over_rows(0) for args in ((x, valid), (x[:1],), (x[1:, :2],)))
    for name in ("load_E", "mass_E", "mass_in_group_E", "z", "z_in_group", "entropy", "tokens"):
        np.testing.assert_allclose(getattr(stats, name), getattr(first, name) + getattr(second, name), rtol=1e-5)
    assert stats.tokens == 7 and stats.load_E.sum() == 7 * 8
    np.testing.assert_allclose(stats.mass_in_group_E.reshape(8, 4).sum(-1), 7, rtol=1e-6)  # probabilities within each group
    assert 0 < stats.z_in_group < stats.z
    np.testing.assert_array_equal(stats.load_E.reshape(8, 4).sum(-1), 7)  # every group gets every token once


def test_losses_by_hand(mesh):
    """Balanced load and mass give 1; everything on one of E experts gives E; inside groups likewise."""
    even = jnp.full((2, 8), 4.0)
    assert balance_loss(even, even / 4, jnp.float32(8.0)) == pytest.approx(1)
    one = jnp.zeros((1, 8)).at[0, 3].set(16.0)
    assert balance_loss(one, one, jnp.float32(16.0)) == pytest.approx(8)
    per_group = jnp.zeros((1, 8)).at[0, jnp.array([0, 4])].set(5.0)
    assert balance_loss(per_group, per_group, jnp.float32(5.0), groups=2) == pytest.approx(4)
    assert z_loss(jnp.array([6.0, 2.0]), jnp.float32(2.0)) == pytest.approx(2)


def test_losses_of_parts_add_up_to_those_of_the_whole():
    """With the loads of the whole, which is how accumulation and packing leave the balancing losses unchanged."""
    load, mass = (jax.random.uniform(jax.random.key(i), (2, 3, 8)) for i in range(2))
    for groups in (1, 4):
        parts = [balance_loss(load.sum(0), mass[part], jnp.float32(9.0), groups) for part in range(2)]
        assert sum(parts) == pytest.approx(balance_loss(load.sum(0), mass.sum(0), jnp.float32(9.0), groups))


def test_global_topk_loss_ignores_padding(mesh):
    logits = jax.random.normal(jax.random.key(0), (2, 6, 8))
    valid = jnp.array([True, True, True, True, False, False])
    whole = global_topk_balance_loss(logits.at[:, 4:].set(50.0), valid, 2)
    np.testing.assert_allclose(whole, global_topk_balance_loss(logits[:, :4], valid[:4], 2), rtol=1e-6)


def test_balance_gradient_reaches_the_router(x):
    config = text_config()
    graph, state = nnx.split(Router(config, rngs=nnx.Rngs(1)))

    def loss(state):
        stats = nnx.merge(graph, state)(x, valid_BT=jnp.ones((2, 5), bool))[1].over_rows(0)
        return balance_loss(stats.load_E[None], stats.mass_E[None], stats.tokens)

    assert np.abs(jax.jit(jax.grad(loss))(state)["kernel_DE"][...]).max() > 0


def test_sizes_that_the_kernel_does_not_take_are_routed_on_a_chip_too(mesh, monkeypatch):
    logits = jax.random.normal(jax.random.key(3), (2, 6, 32))
    elsewhere = router.route_tokens(logits, groups=8, chosen=1)
    monkeypatch.setattr(router, "current_chip", lambda: CHIPS["v6e"])
    jax.tree.map(np.testing.assert_array_equal, router.route_tokens(logits, groups=8, chosen=1), elsewhere)
