"""Dispatch and combine are one bijection read both ways, and neither scatters activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from interns1pro_jax.ops.permutation import combine, dispatch, make_plan, permute_slots, unpermute_slots
from interns1pro_jax.sharding import make_mesh

N, S, G, D = 23, 3, 7, 5
ROUTINGS = {
    "random": np.random.default_rng(0).integers(0, G, (N, S)),
    "all to one": np.full((N, S), 4),
    "falling": np.arange(N * S).reshape(N, S)[::-1] * G // (N * S),
}


@pytest.fixture(params=ROUTINGS.values(), ids=ROUTINGS)
def ids(request):
    return request.param


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (N, D))


def test_plan_is_a_stable_sort(ids):
    plan = make_plan(jnp.asarray(ids), G)
    np.testing.assert_array_equal(plan.order_M, np.argsort(ids.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(np.asarray(plan.dest_NS).reshape(-1)[plan.order_M], np.arange(N * S))
    np.testing.assert_array_equal(plan.group_sizes_G, np.bincount(ids.reshape(-1), minlength=G))


def test_rows_are_the_tokens_of_their_slots(ids, x):
    plan = make_plan(jnp.asarray(ids), G)
    np.testing.assert_array_equal(dispatch(x, plan), x[plan.order_M // S])


def test_round_trip(ids, x):
    plan = make_plan(jnp.asarray(ids), G)
    np.testing.assert_allclose(combine(dispatch(x, plan), plan), S * x, rtol=1e-6)
    weights = jnp.arange(N * S, dtype=jnp.float32).reshape(N, S)
    np.testing.assert_array_equal(unpermute_slots(permute_slots(weights, plan), plan), weights)


def test_gradients_are_those_of_the_gathers(ids, x):
    plan = make_plan(jnp.asarray(ids), G)
    rows = jax.random.normal(jax.random.key(2), (N * S, D))
    weights = jax.random.normal(jax.random.key(3), (N, S))

    def check(function, by_definition, argument):
        out, pullback = jax.vjp(function, argument)
        wanted, pullback_wanted = jax.vjp(by_definition, argument)
        np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
        grad = jax.random.normal(jax.random.key(4), out.shape)
        np.testing.assert_allclose(pullback(grad)[0], pullback_wanted(grad)[0], rtol=1e-5, atol=1e-5)

    check(lambda x: dispatch(x, plan), lambda x: x[plan.order_M // S], x)
    check(lambda r: combine(r, plan), lambda r: r[plan.dest_NS].sum(1), rows)
    check(lambda w: permute_slots(w, plan), lambda w: w.reshape(-1)[plan.order_M], weights)


def test_no_scatter_of_activations():
    """Neither direction, nor its gradient, scatters: the only scatter of a layer is that of the plan's integers."""

    def layer(x, ids):
        plan = make_plan(ids, G)
        return combine(dispatch(x, plan) * 2.0, plan).sum()

    program = jax.jit(jax.grad(layer)).lower(jnp.ones((N, D)), jnp.asarray(ROUTINGS["random"]))
    scatters = [line for line in program.as_text(dialect="hlo").splitlines() if " scatter(" in line]
    assert len(scatters) == 1 and " s32[" in scatters[0], scatters


def test_plan_refuses_what_its_integers_cannot_hold():
    with pytest.raises(ValueError, match=r"4194304 slots of 4096 groups"):
        jax.eval_shape(lambda ids: make_plan(ids, 4096), jax.ShapeDtypeStruct((2**20, 4), jnp.int32))


def test_on_eight_devices(x):
    """Each device permutes its own tokens; a shared token array gets the sum of the devices' gradients."""
    ids = np.random.default_rng(1).integers(0, G, (8, N, S))
    rows = P(("fsdp", "expert"))
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):

        def local(x, ids):
            plan = make_plan(ids[0], G)
            return dispatch(x, plan)[None]

        sharded = jax.shard_map(local, in_specs=(P(), rows), out_specs=rows)
        x_copied = jax.sharding.reshard(x, P())
        ids_split = jax.sharding.reshard(jnp.asarray(ids), rows)
        weights = jax.random.normal(jax.random.key(5), (8, N * S, D))
        out = np.asarray(jax.jit(sharded)(x_copied, ids_split))
        grad = jax.jit(jax.grad(lambda x: (sharded(x, ids_split) * jax.sharding.reshard(weights, rows)).sum()))(x_copied)
        grad = np.asarray(grad)
    orders = [np.argsort(i.reshape(-1), kind="stable") // S for i in ids]
    np.testing.assert_array_equal(out, np.stack([np.asarray(x)[o] for o in orders]))
    wanted = np.zeros((N, D))
    for order, weight in zip(orders, np.asarray(weights), strict=True):
        np.add.at(wanted, order, weight)
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)
