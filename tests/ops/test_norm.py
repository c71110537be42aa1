"""Norms have fp32 statistics, and the released model's order of casts."""

import jax
import jax.numpy as jnp
import numpy as np

from interns1pro_jax.ops.norm import layer_norm, rms_norm

EPS = 1e-6


def test_rms_norm():
    x = 3 * jax.random.normal(jax.random.key(0), (4, 64))
    y = np.asarray(rms_norm(x, jnp.ones(64), EPS))
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(y, np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + EPS), rtol=1e-5)


def test_rms_norm_casts_before_the_weight():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (64,)).astype(jnp.bfloat16)
    normal = rms_norm(x.astype(jnp.float32), jnp.ones(64), EPS).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, weight, EPS), normal * weight)


def test_layer_norm():
    x = 5 + 2 * jax.random.normal(jax.random.key(0), (4, 64))
    scale, bias = jax.random.normal(jax.random.key(1), (2, 64))
    x64 = np.asarray(x, np.float64)
    wanted = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + EPS) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(layer_norm(x, scale, bias, EPS), wanted, rtol=1e-4, atol=1e-5)
    half = layer_norm(x.astype(jnp.bfloat16), scale, bias, EPS)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), wanted, atol=0.1)
