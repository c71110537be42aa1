"""Chunked attention equals attention by its definition, values and gradients, with every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.ops import attention, context
from interns1pro_jax.ops.attention import dot_product_attention, dot_product_attention_reference
from interns1pro_jax.sharding import constrain, make_mesh
from pallas_kernels.chips import CHIPS

B, Q, K, H = 2, 4, 2, 8
SEGMENTS = np.array([[1] * 70 + [2] * 60 + [0] * 20, [0] * 9 + [3] * 141])  # T = 150: several spans, no multiple of anything


def arrays(queries, keys, dtype=jnp.float32, batch=B):
    rng = jax.random.split(jax.random.key(0), 4)
    shapes = (batch, queries, Q, H), (batch, keys, K, H), (batch, keys, K, H), (batch, queries, Q, H)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(rng, shapes, strict=True)]


def value_and_gradients(function, q, k, v, grad, **options):
    def run(q, k, v, grad):
        out, pullback = jax.vjp(lambda q, k, v: function(q, k, v, **options), q, k, v)
        return out, *pullback(grad)

    return jax.jit(run)(q, k, v, grad)


def assert_equal_to_reference(*inputs, tolerance=1e-5, **options):
    got = value_and_gradients(dot_product_attention, *inputs, **options)
    wanted = value_and_gradients(dot_product_attention_reference, *(x.astype(jnp.float32) for x in inputs), **options)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == inputs[0].dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=tolerance, atol=tolerance * 4)
    return got


@pytest.mark.parametrize("causal", [True, False])
def test_segments(causal):
    got = assert_equal_to_reference(*arrays(150, 150), q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS, causal=causal)
    assert not np.abs(got[0])[SEGMENTS == 0].any()


@pytest.mark.parametrize("causal", [True, False])
def test_several_chunks_of_queries(causal, monkeypatch):
    monkeypatch.setattr(attention, "_LONGEST_CHUNK", 32)
    assert_equal_to_reference(*arrays(150, 150), q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS, causal=causal)


def test_bfloat16():
    assert_equal_to_reference(*arrays(150, 150, jnp.bfloat16), q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS, causal=True, tolerance=0.03)


def test_scale():
    segments = np.ones((B, 20), np.int32)
    assert_equal_to_reference(*arrays(20, 20), q_segment_ids=segments, kv_segment_ids=segments, causal=True, scale=0.7)


def test_fewer_keys_than_queries_and_the_reverse():
    for queries, keys in ((90, 30), (30, 90)):
        segments = [np.ones((B, n), np.int32) for n in (queries, keys)]
        assert_equal_to_reference(*arrays(queries, keys), q_segment_ids=segments[0], kv_segment_ids=segments[1], causal=True)


def test_cached_decoding_sees_the_slots_before_it():
    """A query at slot i of a cache gives what the whole row gives at i; empty slots are in segment 0."""
    q, k, v, _ = arrays(40, 40)
    segments = np.array([[1] * 40, [0] * 5 + [1] * 35])
    whole = dot_product_attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=True)
    for slot in (3, 17, 39):
        filled = np.where(np.arange(40) <= slot, segments, 0)
        one = slice(slot, slot + 1)
        step = dot_product_attention(
            q[:, one],
            jnp.where(np.arange(40)[None, :, None, None] <= slot, k, 1e4),
            v,
            q_segment_ids=segments[:, one],
            kv_segment_ids=filled,
            q_index=np.full((B, 1), slot),
            causal=True,
        )
        np.testing.assert_allclose(step, whole[:, one], rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_are_zero_and_have_finite_gradients():
    segments = np.zeros((B, 70), np.int32)
    got = value_and_gradients(dot_product_attention, *arrays(70, 70), q_segment_ids=segments, kv_segment_ids=segments, causal=True)
    assert all((np.asarray(x) == 0).all() for x in got)


def test_split_over_eight_devices():
    inputs = arrays(70, 70, batch=8)
    segments = jnp.asarray(np.tile(SEGMENTS[:, 40:110], (4, 1)))
    wanted = value_and_gradients(dot_product_attention_reference, *inputs, q_segment_ids=segments, kv_segment_ids=segments, causal=True)
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        split = [constrain(x, "batch", *(None,) * (x.ndim - 1)) for x in (*inputs, segments)]
        got = value_and_gradients(dot_product_attention, *split[:4], q_segment_ids=split[4], kv_segment_ids=split[4], causal=True)
        for x, y in zip(got, wanted, strict=True):
            assert x.sharding.spec[0] == ("data", "fsdp", "expert")
            np.testing.assert_allclose(np.asarray(x), y, rtol=1e-5, atol=4e-5)


def test_rows_split_over_devices_equal_whole_rows(monkeypatch):
    """By what the kernel is given on a chip: its queries, two runs of the row, know where they stand among whole keys."""
    ranks, length, given = 2, 512, []

    def kernel(q, k, v, q_segment, kv_segment, index, *, causal, scale, tiling, runs, name):
        given.append((q.shape[1], k.shape[1], runs))
        return dot_product_attention_reference(
            q, k, v, q_segment_ids=q_segment, kv_segment_ids=kv_segment, q_index=index, causal=causal, scale=scale
        )  # fmt: skip

    monkeypatch.setattr(attention, "current_chip", lambda: CHIPS["v5p"])
    monkeypatch.setattr(attention.tpu, "attention", kernel)
    inputs = arrays(length, length)
    segments = jnp.asarray(np.repeat(SEGMENTS, 4, 1)[:, :length])
    wanted = value_and_gradients(dot_product_attention_reference, *inputs, q_segment_ids=segments, kv_segment_ids=segments, causal=True)
    with jax.set_mesh(make_mesh(context=ranks)):
        q, k, v, grad = (context.balance(constrain(x, "batch", "sequence", None, None)) for x in inputs)
        ids = context.balance(constrain(segments, "batch", "sequence"))
        got = value_and_gradients(dot_product_attention, q, k, v, grad, q_segment_ids=ids, kv_segment_ids=segments, causal=True)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(context.reading_order(x), y, rtol=1e-5, atol=4e-5)
    assert {*given} == {(length // ranks, length, 2)}


def test_places_of_queries_are_not_given_where_rows_are_split():
    with jax.set_mesh(make_mesh(context=2)):
        q, k, v, _ = (constrain(x, "batch", "sequence", None, None) for x in arrays(16, 16))
        ids = jnp.ones((B, 16), jnp.int32)
        with pytest.raises(ValueError, match="q_index with keys that are split over the mesh axis context"):
            dot_product_attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, q_index=ids, causal=True)
