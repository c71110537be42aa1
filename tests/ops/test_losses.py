"""The chunked loss equals the loss from all logits, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.ops import losses
from interns1pro_jax.ops.losses import (
    IGNORED,
    cross_entropy,
    cross_entropy_reference,
    label_weights,
    ordered_sums,
    token_log_probs,
    token_log_probs_reference,
)
from interns1pro_jax.sharding import constrain, make_mesh

B, T, D, V = 8, 6, 16, 50


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    head = jax.random.normal(keys[1], (D, V)) * 0.5
    labels = jax.random.randint(keys[2], (B, T), 0, V).at[0, :3].set(IGNORED).at[5].set(IGNORED)
    return hidden, head, labels


def value_and_gradients(function, hidden, head, labels):
    def mean(hidden, head):
        total, count = function(hidden, head, labels)
        return 3 * total / count, (total, count)

    grads, (total, count) = jax.jit(jax.grad(mean, argnums=(0, 1), has_aux=True))(hidden, head)
    return [np.asarray(x.astype(jnp.float32)) for x in (total, count, *grads)]


def on_mesh(function, mesh, hidden, head, labels):
    with jax.set_mesh(mesh):
        return value_and_gradients(
            function, constrain(hidden, "batch", "sequence", None), constrain(head, "embed", None), constrain(labels, "batch", "sequence")
        )


@pytest.mark.parametrize("chunk", [2**25, 128 * V, 3 * V], ids=["one chunk", "least chunk", "less than the least"])
def test_equals_reference(chunk, mesh, monkeypatch):
    monkeypatch.setattr(losses, "_MAX_LOGITS", chunk)
    for x, y in zip(value_and_gradients(cross_entropy, *arrays()), value_and_gradients(cross_entropy_reference, *arrays()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_many_chunks(mesh, monkeypatch):
    monkeypatch.setattr(losses, "_LEAST_CHUNK", 7)
    monkeypatch.setattr(losses, "_MAX_LOGITS", 7 * V)
    for x, y in zip(value_and_gradients(cross_entropy, *arrays()), value_and_gradients(cross_entropy_reference, *arrays()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_weights(mesh):
    weights = jax.random.uniform(jax.random.key(7), (B, T))
    weighted = [functools.partial(function, weights_BT=weights) for function in (cross_entropy, cross_entropy_reference)]
    for x, y in zip(*(value_and_gradients(function, *arrays()) for function in weighted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("averaging", "power"), [("token", 0), ("square", 0.5), ("sample", 1)])
def test_label_weights_on_any_mesh(averaging, power):
    """Documents of 1, 3 and 2 labels, positions without a label and padding."""
    segments = np.tile([1, 1, 2, 2, 2, 2, 5, 5, 0, 0], (8, 1))
    labels = np.where(np.tile([0, 1, 1, 0, 1, 1, 1, 1, 0, 0], (8, 1)), 7, IGNORED)
    wanted = np.array([0, 1, 3**-power, 0, 3**-power, 3**-power, 2**-power, 2**-power, 0, 0])
    for sizes in ({}, dict(fsdp=2, context=2, expert=2)):
        with jax.set_mesh(make_mesh(**sizes)):
            weights = jax.jit(label_weights, static_argnums=2)(labels, segments, averaging)
            np.testing.assert_allclose(weights, np.tile(wanted, (8, 1)), rtol=1e-6)
            np.testing.assert_allclose(jax.jit(ordered_sums)(weights), 8 * wanted.sum(), rtol=1e-6)


def test_bfloat16(mesh):
    hidden, head, labels = arrays(jnp.bfloat16)
    got = value_and_gradients(cross_entropy, hidden, head, labels)
    wanted = value_and_gradients(cross_entropy_reference, hidden.astype(jnp.float32), head, labels)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0.03, atol=0.01 * np.abs(y).max())


def test_ignored_tokens_have_no_gradient(mesh):
    hidden, head, labels = arrays()
    _, count, grad, _ = value_and_gradients(cross_entropy, hidden, head, labels)
    assert count == B * T - 3 - T
    assert ((np.abs(grad).max(-1) == 0) == (np.asarray(labels) == IGNORED)).all()


def test_no_label_at_all(mesh):
    hidden, head, labels = arrays()
    total, count = cross_entropy(hidden, head, jnp.full_like(labels, IGNORED))
    assert total == 0 and count == 0


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=4), dict(data=2, fsdp=2, context=2)], ids=str)
def test_eight_devices_equal_one(sizes):
    one = on_mesh(cross_entropy, make_mesh(), *arrays())
    for x, y in zip(on_mesh(cross_entropy, make_mesh(**sizes), *arrays()), one, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def log_probs_and_gradients(function, hidden, head, labels):
    """Of a sum in which every token has a weight of its own, as in policy gradients."""
    weights = jnp.sin(jnp.arange(labels.size, dtype=jnp.float32)).reshape(labels.shape)

    def objective(hidden, head):
        log_probs = function(hidden, head, labels)
        return jnp.sum(jnp.exp(log_probs) * jax.sharding.reshard(weights, jax.typeof(log_probs).sharding.spec)), log_probs

    grads, log_probs = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(hidden, head)
    return [np.asarray(x.astype(jnp.float32)) for x in (log_probs, *grads)]


@pytest.mark.parametrize("chunk", [7, 128], ids=["many chunks", "one chunk"])
def test_log_probs_equal_reference(chunk, mesh, monkeypatch):
    monkeypatch.setattr(losses, "_LEAST_CHUNK", chunk)
    monkeypatch.setattr(losses, "_MAX_LOGITS", chunk * V)
    got, wanted = (log_probs_and_gradients(f, *arrays()) for f in (token_log_probs, token_log_probs_reference))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert (got[0][np.asarray(arrays()[2]) == IGNORED] == 0).all() and (got[0] <= 0).all()


def test_log_probs_on_eight_devices_equal_one():
    def on(sizes):
        with jax.set_mesh(make_mesh(**sizes)):
            hidden, head, labels = arrays()
            return log_probs_and_gradients(
                token_log_probs, constrain(hidden, "batch", "sequence", None), constrain(head, "embed", None), labels
            )

    for x, y in zip(on(dict(fsdp=2, context=2, expert=2)), on({}), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
