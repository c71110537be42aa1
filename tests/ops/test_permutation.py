"""Dispatch and combine are one bijection read both ways, and neither scatters activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from interns1pro_jax.ops.permutation import combine, destinations, dispatch, make_plan, permute_slots, unpermute_slots
from interns1pro_jax.sharding import make_mesh
from pallas_kernels.routing_reference import count_ranks

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


def plan_of(ids):
    """The plan of one device that owns all experts, which are one group."""
    ids_TGC = jnp.asarray(ids)[:, None]
    ranks, counts = count_ranks(ids_TGC, G)
    sizes = counts.sum(0)
    return make_plan(destinations(ids_TGC, ranks, counts, sizes[None], 0)[:, 0], sizes)


def test_plan_is_a_stable_sort(ids):
    plan = plan_of(ids)
    np.testing.assert_array_equal(plan.order_M, np.argsort(ids.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(np.asarray(plan.dest_NS).reshape(-1)[plan.order_M], np.arange(N * S))
    np.testing.assert_array_equal(plan.group_sizes_G, np.bincount(ids.reshape(-1), minlength=G))


def test_rows_are_the_tokens_of_their_slots(ids, x):
    plan = plan_of(ids)
    np.testing.assert_array_equal(dispatch(x, plan), x[plan.order_M // S])


def test_round_trip(ids, x):
    plan = plan_of(ids)
    np.testing.assert_allclose(combine(dispatch(x, plan), plan), S * x, rtol=1e-6)
    weights = jnp.arange(N * S, dtype=jnp.float32).reshape(N, S)
    np.testing.assert_array_equal(unpermute_slots(permute_slots(weights, plan), plan), weights)


def test_gradients_are_those_of_the_gathers(ids, x):
    plan = plan_of(ids)
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
        plan = plan_of(ids)
        return combine(dispatch(x, plan) * 2.0, plan).sum()

    text = jax.jit(jax.grad(layer)).lower(jnp.ones((N, D)), jnp.asarray(ROUTINGS["random"])).as_text(dialect="hlo")
    scatters = [line for line in text.splitlines() if " scatter(" in line]
    assert len(scatters) == 1 and " s32[" in scatters[0], scatters
    assert " sort(" not in text


def test_owners_sort_the_slots_of_all_devices():
    """Several chunks of tokens (the last one short), several choices with repeats, four devices that own two groups each."""
    devices, tokens, groups, chosen, size = 4, 300, 8, 2, 5
    ids = np.random.default_rng(3).integers(0, size, (devices, tokens, groups, chosen)) ** 2 // size  # the first expert most often
    ranks, counts = jax.vmap(lambda x: count_ranks(x, size))(jnp.asarray(ids))
    sizes = counts.sum(1)
    rows = jnp.stack([destinations(jnp.asarray(ids[r]), ranks[r], counts[r], sizes, r) for r in range(devices)])
    for owner, mine in enumerate(np.split(np.arange(groups), devices)):
        expert = ids[:, :, mine] + size * np.arange(2)[:, None]
        order = np.argsort(expert.reshape(-1), kind="stable")
        np.testing.assert_array_equal(np.argsort(np.asarray(rows[:, :, mine]).reshape(-1)), order)
        np.testing.assert_array_equal(np.split(sizes.sum(0), devices)[owner], np.bincount(expert.reshape(-1), minlength=2 * size))


def test_on_eight_devices(x):
    """Each device permutes its own tokens; a shared token array gets the sum of the devices' gradients."""
    ids = np.random.default_rng(1).integers(0, G, (8, N, S))
    rows = P(("fsdp", "expert"))
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):

        def local(x, ids):
            plan = plan_of(ids[0])
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
