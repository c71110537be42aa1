"""The routing kernels, emulated, equal the definition: choices, ranks and counts to the bit, probabilities and gradients to rounding.

The emulator fills memory with NaN before its first use, refuses accesses out of bounds, and looks for races.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as emulator
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from interns1pro_jax.ops.varying import as_varying, varying_axes
from interns1pro_jax.sharding import make_mesh
from pallas_kernels.routing import BLOCK, route
from pallas_kernels.routing_reference import CHUNK, count_ranks, route_reference

EMULATED = (("interpret", pltpu.InterpretParams(detect_races=True)),)
GROUPS, SIZE = 8, 16
NONE = 255
rng = np.random.default_rng(0)


def logits(tokens, kind):
    z = 2 * rng.normal(size=(tokens, GROUPS, SIZE)).astype(np.float32)
    if kind == "tied":
        z = np.round(z)
    if kind == "one expert":
        z[:, :, 3] += 50
    if kind == "equal":
        z[:] = 0
    if kind == "large":
        z *= 1e4
    return jnp.asarray(z.reshape(tokens, -1))


@functools.partial(jax.jit, static_argnames=("function", "temperature", "options"))
def value_and_gradients(function, z, replay, upstream, temperature=1.0, options=()):
    """Of [tokens, groups, chosen] probabilities; gradients of the logits and of the probe."""
    groups, chosen = upstream.shape[1:]

    def probabilities(z, probe):
        routes = function(z, replay, probe, groups=groups, chosen=chosen, temperature=temperature, **dict(options))
        return routes.probs_TGC, routes

    _, pullback, routes = jax.vjp(probabilities, z, jnp.float32(0), has_aux=True)
    return routes, pullback(upstream)


def route_halves(z, replay, probe, **options):
    """Both halves of the tokens, each by itself."""
    halves = [None if x is None else x.reshape(2, -1, *x.shape[1:]) for x in (z, replay)]
    routes = jax.vmap(functools.partial(route, **options), in_axes=(0, 0, None))(*halves, probe)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), routes)


def check(z, chosen, replay=None, temperature=1.0, groups=GROUPS, function=route, options=EMULATED):
    upstream = jnp.asarray(rng.normal(size=(z.shape[0], groups, chosen)), jnp.float32)
    got, (got_grad, got_probe) = value_and_gradients(function, z, replay, upstream, temperature, options)
    wanted, (grad, probe) = value_and_gradients(route_reference, z, replay, upstream, temperature)
    for name in ("ids_TGC", "ranks_TGC", "counts_NE"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)
        assert getattr(got, name).dtype == jnp.int32
    np.testing.assert_allclose(got.probs_TGC, wanted.probs_TGC, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-5, atol=1e-6 * np.nanmax(np.abs(grad)))
    np.testing.assert_allclose(got_probe, probe, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(np.nan_to_num(got_grad).sum(-1), 0, atol=1e-5)
    assert emulator.races is None or not emulator.races.races_found
    return got, got_grad


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("kind", ["random", "tied", "one expert", "equal", "large"])
def test_equals_the_definition(kind, chosen):
    check(logits(2 * CHUNK, kind), chosen)


def test_rows_of_whole_chunks_are_routed_apart_as_they_are_together():
    """Each with a second block that is partly filled."""
    tokens = 2 * (BLOCK + CHUNK)
    replay = rng.integers(0, SIZE, (tokens, GROUPS, 2)).astype(np.int32)
    replay[::3] = NONE
    options = (("interpret", True),)  # the emulator knows no vmap
    check(logits(tokens, "random"), 2, jnp.asarray(replay), function=route_halves, options=options)


@pytest.mark.parametrize("tokens", [1, CHUNK + 1, BLOCK + 1])
def test_any_number_of_tokens(tokens):
    check(logits(tokens, "random"), 1)


@pytest.mark.parametrize("groups, size, chosen", [(16, 8, 1), (2, 64, 3), (1, 128, 1), (16, 8, 8)])
def test_any_groups(groups, size, chosen):
    """Down to one group, and up to all experts of a group."""
    z = jnp.asarray(np.round(2 * rng.normal(size=(5, groups * size))), jnp.float32)
    check(z, chosen, groups=groups)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_experts_that_are_not_chosen_learn_too(temperature):
    z = logits(3, "random")
    _, grad = check(z, 1, temperature=temperature)
    assert (np.abs(grad) > 0).all()  # the plain gradient is zero at all but the chosen


@pytest.mark.parametrize("chosen, temperature", [(1, 1.0), (2, 0.5)])
def test_replay(chosen, temperature):
    """Recorded choices, some the same twice for a token, some missing, some of no expert."""
    replay = rng.integers(0, SIZE, (2 * CHUNK, GROUPS, chosen)).astype(np.int32)
    replay[::3] = NONE
    replay[1::3, :, -1] = NONE
    replay[2::3, 0] = -1
    replay[5::3, 1] = SIZE
    got, _ = check(logits(2 * CHUNK, "random"), chosen, jnp.asarray(replay), temperature)
    recorded = (replay >= 0) & (replay < SIZE)
    np.testing.assert_array_equal(np.asarray(got.ids_TGC)[recorded], replay[recorded])


@pytest.mark.parametrize("bad, chosen", [(np.nan, 1), (np.inf, 2), (-np.inf, 1), (-np.inf, 2)])
def test_what_is_no_number(bad, chosen):
    """The rows of a step that is about to be rejected must still be a permutation, and other tokens know nothing of it."""
    z = np.array(logits(CHUNK, "random"))
    z[3], z[4, ::2], z[5, :SIZE], z[6, 7], z[7, 1:SIZE] = bad, bad, bad, bad, bad
    got, grad = check(jnp.asarray(z), chosen)
    assert ((np.asarray(got.ids_TGC) >= 0) & (np.asarray(got.ids_TGC) < SIZE)).all()
    lost = np.isnan(got.probs_TGC).any((1, 2))
    np.testing.assert_array_equal(np.flatnonzero(lost), [3] if bad == -np.inf else [3, 4, 5, 6, 7])
    np.testing.assert_array_equal(np.asarray(got.ids_TGC)[lost], np.broadcast_to(np.arange(chosen), (lost.sum(), GROUPS, chosen)))
    np.testing.assert_array_equal(np.isnan(grad).any(1), lost)


def test_ranks_and_counts_by_hand():
    count = jax.jit(count_ranks, static_argnums=1)
    ids = jnp.asarray([[[2]], [[0]], [[2]], [[2]], [[0]]] + [[[1]]] * CHUNK)
    ranks, counts = count(ids, 3)
    np.testing.assert_array_equal(ranks[:6, 0, 0], [0, 0, 1, 2, 1, 0])
    np.testing.assert_array_equal(ranks[-5:, 0, 0], np.arange(5))  # the second chunk counts anew
    np.testing.assert_array_equal(counts, [[2, CHUNK - 5, 3], [0, 5, 0]])
    np.testing.assert_array_equal(count(jnp.asarray([[[1, 1]], [[0, 1]]]), 2)[0][:, 0], [[0, 1], [0, 2]])


def test_on_a_mesh():
    """Inside shard_map with its check of what varies: ranks and counts are a device's own."""
    mesh = make_mesh(expert=2, devices=jax.devices()[:2])
    z, upstream = logits(2 * CHUNK, "random"), jnp.ones((2 * CHUNK, GROUPS, 1))

    def local(z, upstream, probe):
        _, pullback, routes = jax.vjp(
            lambda z, probe: (lambda r: (r.probs_TGC, r))(
                route(z, None, as_varying(probe, varying_axes(z)), groups=GROUPS, chosen=1, interpret=pltpu.InterpretParams())
            ),
            z,
            probe,
            has_aux=True,
        )
        return routes.ranks_TGC, routes.counts_NE, *pullback(upstream)

    with jax.set_mesh(mesh):
        rows = P("expert")
        run = jax.jit(jax.shard_map(local, in_specs=(rows, rows, P()), out_specs=(rows, rows, rows, P())))
        ranks, counts, grad, probe = jax.tree.map(
            np.asarray, run(*(jax.device_put(x, jax.NamedSharding(mesh, rows)) for x in (z, upstream)), jnp.float32(0))
        )
    wanted, (wanted_grad, wanted_probe) = value_and_gradients(route_reference, z, None, upstream)
    np.testing.assert_array_equal(ranks, wanted.ranks_TGC)  # a device has one chunk
    np.testing.assert_array_equal(counts, wanted.counts_NE)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(probe, wanted_probe, rtol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(z=jnp.zeros((2, 4, 128))), ValueError, r"logits_TE must have rank 2, got shape \(2, 4, 128\)"),
        (dict(z=jnp.zeros((4, 128), jnp.bfloat16)), TypeError, "logits_TE must be float32, got bfloat16"),
        (dict(z=jnp.zeros((0, 128))), ValueError, "no tokens"),
        (dict(groups=3), ValueError, "128 experts do not divide into groups=3"),
        (dict(groups=32), ValueError, "a multiple of 8 experts, a multiple of 128 in all; got 32 groups of 4. Use route_reference"),
        (dict(z=jnp.zeros((4, 64))), ValueError, "a multiple of 128 in all; got 8 groups of 8"),
        (dict(chosen=0), ValueError, r"chosen=0 must lie in 1\.\.16"),
        (dict(temperature=0.0), ValueError, "temperature=0.0 must be positive"),
        (dict(replay=jnp.zeros((4, 8, 2), jnp.int32)), ValueError, r"replay_TGC must have shape \(4, 8, 1\)"),
        (dict(replay=jnp.zeros((4, 8, 1))), TypeError, "replay_TGC must be integers, got float32"),
        (dict(probe=jnp.zeros(2)), ValueError, "probe must be a float32 scalar"),
    ],
)
def test_misuse_is_an_error_while_tracing(change, error, message):
    arguments = dict(z=jnp.zeros((4, 128)), replay=None, probe=None, groups=8, chosen=1, temperature=1.0) | change
    positional = [arguments.pop(name) for name in ("z", "replay", "probe")]
    with pytest.raises(error, match=message):
        route(*positional, **arguments)
