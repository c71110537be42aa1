"""Attention of TPUs, by splash and by our kernels, equals attention by its definition, and leaves out what no document needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from interns1pro_jax.ops.attention import dot_product_attention_reference
from pallas_kernels import attention
from pallas_kernels.attention import HIDDEN, PARTLY, STAIRS, WHOLLY, Tiling
from pallas_kernels.chips import CHIPS

S, Q, K, H = 512, 4, 2, 128
SEGMENTS = np.array([0] * 10 + [1] * 190 + [2] * 200 + [3] * 50 + [0] * 62, np.int32)
# Rows of other documents: the second out of order and in parts, the third a single one.
ROWS = np.stack([SEGMENTS, np.array([2] * 60 + [1] * 200 + [2] * 30 + [7] * 180 + [0] * 42, np.int32), np.ones(S, np.int32)])
# For blocks of three steps, of which the second begins within a half of a chunk; rows of documents and of a single one.
LONGER = np.stack([np.array([0] * 10 + [1] * 190 + [2] * 300 + [3] * 150 + [0] * 118, np.int32), np.ones(768, np.int32)])
# The queries of the second of two devices that share the row: chunks 1 and 2 of 4.
SHARE = np.arange(128, 384, dtype=np.int32)


def operands(index, width=H, rows=ROWS):
    keys = rows.shape[1]
    shapes = (len(index), Q, width), (keys, K, width), (keys, K, width), (len(index), Q, width)
    return [jax.random.normal(jax.random.key(i), (len(rows), *shape)) for i, shape in enumerate(shapes)]


def gradients(function, q, k, v, grad):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(grad)


ROW = np.arange(S, dtype=np.int32)
# Blocks of 128 hold one document, several, or padding as well. With no memory for our kernels all is splash's.
SHORT = Tiling((128, 256, 128), (128, 128, 128), 1 << 30, (128, 128), (128, 128))
LONG = dataclasses.replace(SHORT, vmem=0)
# Blocks on the diagonal are stairs of three steps, or have keys that only the later half of the queries sees.
STEPS = dataclasses.replace(SHORT, short=(384, 384), gradient=(768, 384))
# Memory that nothing was written to holds no numbers, and what is read out of bounds is an error.
EMULATED = pltpu.InterpretParams()


def results(function, index, causal, dtype=jnp.float32, exact=False, padding=True, width=H, rows=ROWS):
    """Output at valid queries and gradients of `function`, for operands of `dtype` or, `exact`, rounded to it.

    With `padding`, its results have gradients, and keys of which weights could be of any size.
    """
    q_segment, kv_segment, places = jnp.asarray(rows[:, index]), jnp.asarray(rows), jnp.tile(index, (len(rows), 1))
    valid = (q_segment > 0)[..., None, None]
    q, k, v, grad = (x.astype(dtype).astype(jnp.float32 if exact else dtype) for x in operands(index, width, rows))
    if padding:
        k = jnp.where((kv_segment > 0)[..., None, None], k, 100 * k)
    else:
        grad = jnp.where(valid, grad, 0)
    run = functools.partial(function, q_segment, kv_segment, places, causal)
    out, *got = jax.jit(lambda *x: gradients(run, *x))(q, k, v, grad)
    assert np.isfinite(out).all()
    return [np.asarray(x, np.float32) for x in (jnp.where(valid, out, 0), *got)]


def kernel(tiling, interpret, q_segment, kv_segment, places, causal, q, k, v):
    scale = q.shape[-1] ** -0.5
    return attention.attention(
        q, k, v, q_segment, kv_segment, places, causal=causal, scale=scale, tiling=tiling, interpret=interpret
    )  # fmt: skip


def reference(q_segment, kv_segment, places, causal, q, k, v):
    return dot_product_attention_reference(
        q, k, v, q_segment_ids=q_segment, kv_segment_ids=kv_segment, q_index=places, causal=causal
    )  # fmt: skip


@pytest.mark.parametrize(
    ("causal", "rows", "index", "tiling", "width"),
    [
        (True, ROWS, SHARE, LONG, 128),
        (True, ROWS, SHARE, SHORT, 128),
        (True, LONGER, np.arange(768, dtype=np.int32), STEPS, 128),
        (False, ROWS, ROW, SHORT, 64),
    ],
    ids=["long", "share", "steps", "row"],
)
def test_equals_reference(causal, rows, index, tiling, width):
    """Of rows that hold other documents; heads that are whole registers lie beside each other in our kernels' results."""
    padding = tiling is not LONG
    options = dict(padding=padding, width=width, rows=rows)
    got = results(functools.partial(kernel, tiling, EMULATED if padding else True), index, causal, **options)
    for x, y in zip(got, results(reference, index, causal, **options), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_its_denominators(causal):
    """By their definition, in float64, where a block of queries needs every chunk: then padding sees all padding."""
    index = ROW[256:]
    q, k, v, _ = (x[:1].swapaxes(1, 2) for x in operands(index))
    k = jnp.where(SEGMENTS[:, None] > 0, k, 2 * k)
    # Of the kernel the logarithm is to the base of 2, and scores are exponents of 2.
    arrays = (q, k * np.log2(np.e), v, *(jnp.asarray(x[None]) for x in (SEGMENTS[index], SEGMENTS, index)))
    plan = attention._plan(len(index), 1, k.swapaxes(1, 2), dataclasses.replace(SHORT, short=(256, 256)), causal, None, EMULATED)
    out, log_z = jax.jit(functools.partial(attention._whole_rows, plan))(*arrays)
    visible = SEGMENTS[index][:, None] == SEGMENTS
    visible = visible & (index[:, None] >= ROW) if causal else visible
    scores = np.where(visible, np.einsum("qth,qsh->qts", q[0], np.repeat(k[0], Q // K, 0), dtype=np.float64), -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    want = weights @ np.repeat(v[0], Q // K, 0) / weights.sum(-1, keepdims=True)
    assert plan.short.forward == (256, 256)
    np.testing.assert_allclose(out[0].reshape(-1, Q, H).swapaxes(0, 1), want, atol=5e-5)
    np.testing.assert_allclose(np.log(2) * log_z[0], (top + np.log(weights.sum(-1, keepdims=True)))[..., 0], atol=5e-5, rtol=1e-6)


def test_rounds_as_the_operands_do():
    """Gradients in bfloat16 are those of the same numbers in float32, but for the rounding of weights and results."""
    got = results(functools.partial(kernel, SHORT, EMULATED), SHARE, True, jnp.bfloat16)
    for x, y in zip(got, results(reference, SHARE, True, jnp.bfloat16, exact=True), strict=True):
        assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


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


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_know_what_they_see(causal):
    """Blocks without a score that counts are left out; those are not masked whose scores all count."""
    index = np.concatenate([SHARE[:64], SHARE[:64] + 192])
    q_segment = np.where(SEGMENTS[index] > 0, SEGMENTS[index], -1)
    sight = np.asarray(attention._sight(jnp.asarray(q_segment), jnp.asarray(SEGMENTS), jnp.asarray(index), 32, 32, causal))
    scores = q_segment[:, None] == SEGMENTS
    scores = (scores & (np.arange(S) <= index[:, None]) if causal else scores).reshape(len(index) // 32, 32, S // 32, 32)
    np.testing.assert_array_equal(sight, np.where(scores.all((1, 3)), WHOLLY, np.where(scores.any((1, 3)), PARTLY, HIDDEN)))
    assert {*sight.ravel()} == {HIDDEN, PARTLY, WHOLLY}


def test_what_is_left_out_of_stairs_no_query_sees():
    """All scores that count are computed, and those that are not masked count. In rows of one document and of several, in their own order
    and where a device has two runs of them."""
    size, cell = 128, 32
    ones = np.ones(S, np.int32)
    for segment, index in ((ones, ROW), (SEGMENTS, ROW), (SEGMENTS, np.concatenate([ROW[:128], ROW[-128:]])), (ROWS[1], SHARE - 16)):
        q_segment = np.where(segment[index] > 0, segment[index], -1)
        places = jnp.asarray(q_segment), jnp.asarray(segment), jnp.asarray(index)
        scores = ((q_segment[:, None] == segment) & (np.arange(S) <= index[:, None])).reshape(len(index) // size, size, S // size, size)
        found = np.asarray(attention._stairs(*places, size, cell))
        steps = np.arange(size) // cell
        for block, chunk in np.ndindex(found.shape):
            of, (query, key) = scores[block, :, chunk], (steps[:, None], steps)
            behind = (index[block * size :][:size, None] < chunk * size + (query + 1) * cell).all()
            assert (found[block, chunk] > 0) == behind and not (behind and of[key > query].any())
            assert (found[block, chunk] == STAIRS) == (behind and of[key < query].all())
    assert {*np.diag(attention._stairs(*(jnp.asarray(x) for x in (ones, ones, ROW)), size, cell)).tolist()} == {STAIRS}


def test_loads_the_next_block_that_is_visited():
    seen = jnp.array([[False, True, False, True, False], [False] * 5])
    np.testing.assert_array_equal(attention._following(seen, 1), [[1, 1, 3, 3, 3], [0] * 5])
    np.testing.assert_array_equal(attention._following(seen.T, 0), [[1, 0], [1, 0], [3, 0], [3, 0], [3, 0]])


@pytest.mark.parametrize("tiling", [SHORT, LONG], ids=["short", "long"])
def test_no_block_of_queries_spans_two_runs(tiling, monkeypatch):
    """The first of two devices that share the row has its first and last chunk: a block of both would visit all keys between them."""
    index = np.concatenate([ROW[:128], ROW[-128:]])
    blocks, ids, places = [], jnp.asarray(ROWS), jnp.tile(index, (len(ROWS), 1))

    def recorded(tables):
        def record(q_segment, kv_segment, q_index, queries, keys, causal):
            blocks.append(queries)
            return tables(q_segment, kv_segment, q_index, queries, keys, causal)

        return record

    for name in ("_seen", "_sight"):
        monkeypatch.setattr(attention, name, recorded(getattr(attention, name)))
    wide = dataclasses.replace(tiling, forward=(256, 256, 128), backward=(256, 128, 128), short=(256, 128), gradient=(256, 128))

    def loss(q, k, v, runs):
        return attention.attention(
            q, k, v, ids[:, index], ids, places, causal=True, scale=1.0, tiling=wide, runs=runs, interpret=True
        ).sum()  # fmt: skip

    for runs in (1, 2):
        blocks.clear()
        jax.eval_shape(jax.grad(functools.partial(loss, runs=runs), argnums=(0, 1, 2)), *operands(index)[:3])
        assert len(blocks) >= 2 and max(blocks) == 256 // runs


def test_tables_that_scalar_memory_does_not_hold_are_splash_s():
    """Rows of 127 x 128 tokens have no blocks but of 128: a table of 63 KiB for each."""

    def plan(rows: int, tokens: int) -> attention._Plan:
        keys = jax.ShapeDtypeStruct((rows, tokens, 1, 128), jnp.bfloat16)
        return attention._plan(tokens, 1, keys, attention.tiling_of(CHIPS["v6e"]), True, None, False)

    assert plan(4, 127 * 128).short and not plan(5, 127 * 128).short
    assert plan(64, 4096).short
