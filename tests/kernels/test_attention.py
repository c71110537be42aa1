"""Splash attention with tables from the row itself equals attention by its definition, and leaves out what no document needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.ops.attention import dot_product_attention_reference
from pallas_kernels import attention
from pallas_kernels.attention import Tiling

S, Q, K, H = 512, 4, 2, 64
SEGMENTS = np.array([0] * 10 + [1] * 190 + [2] * 200 + [3] * 50 + [0] * 62, np.int32)
# The queries of the second of two devices that share the row: chunks 1 and 2 of 4.
SHARE = np.arange(128, 384, dtype=np.int32)


def operands(index):
    shapes = (len(index), Q, H), (S, K, H), (S, K, H), (len(index), Q, H)
    return [jax.random.normal(jax.random.key(i), (1, *shape)) for i, shape in enumerate(shapes)]


def gradients(function, q, k, v, grad):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(grad)


@pytest.mark.parametrize(("causal", "index", "fused"), [(True, SHARE, 0), (False, np.arange(S, dtype=np.int32), 4)], ids=["share", "row"])
def test_equals_reference(causal, index, fused):
    q_segment, kv_segment, places = (jnp.asarray(x[None]) for x in (SEGMENTS[index], SEGMENTS, index))
    tiling = Tiling((128, 256, 128), (128, 128, 128), fused)

    def kernel(q, k, v):
        return attention.attention(
            q, k, v, q_segment, kv_segment, places, causal=causal, scale=H**-0.5, tiling=tiling, interpret=True
        )  # fmt: skip

    def reference(q, k, v):
        return dot_product_attention_reference(
            q, k, v, q_segment_ids=q_segment, kv_segment_ids=kv_segment, q_index=places, causal=causal
        )  # fmt: skip

    # Nothing that is made of padding counts in a loss.
    q, k, v, grad = operands(index)
    grad = jnp.where((q_segment > 0)[..., None, None], grad, 0)
    (out, *got), (wanted_out, *wanted) = (jax.jit(lambda *x, f=f: gradients(f, *x))(q, k, v, grad) for f in (kernel, reference))
    valid = SEGMENTS[index] > 0
    np.testing.assert_allclose(out[0, valid], wanted_out[0, valid], atol=2e-5)
    assert np.isfinite(out).all()
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_visits_the_blocks_of_the_documents_and_no_others(causal):
    """Every score that counts is in a visited block; a visited block has such a score or a query's own key."""
    index = np.concatenate([SHARE[:64], SHARE[:64] + 320])
    seen = np.asarray(attention._seen(jnp.asarray(SEGMENTS[index]), jnp.asarray(SEGMENTS), jnp.asarray(index), 32, 64, causal))
    same = (SEGMENTS[index][:, None] == SEGMENTS) & (SEGMENTS[index][:, None] > 0)
    scores = same & (np.arange(S) <= index[:, None]) if causal else same
    needed = (scores | (np.arange(S) == index[:, None])).reshape(len(index) // 32, 32, S // 64, 64).any((1, 3))
    np.testing.assert_array_equal(seen, needed)
    assert needed.mean() < 0.5


def test_loads_the_next_block_that_is_visited():
    seen = jnp.array([[False, True, False, True, False], [False] * 5])
    np.testing.assert_array_equal(attention._following(seen, 1), [[1, 1, 3, 3, 3], [0] * 5])
    np.testing.assert_array_equal(attention._following(seen.T, 0), [[1, 0], [1, 0], [3, 0], [3, 0], [3, 0]])
