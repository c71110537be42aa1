"""Attention on TPU for rows whose keys and values fit in vector memory.

A key/value head's keys and values stay in vector memory while the queries that share it pass, block by block; each block goes over the
chunks of keys that it sees. Scores stand with keys before queries, so that a query's maximum and sum go down the rows of registers,
without moving lanes, and its numbers lie along lanes as the result's denominators do. The sum of weighted values is turned for the same
reason, and since its product then fills matrix units that are wider than a head.

A query's weights need the largest score first, so that products and weights of one chunk follow each other. Therefore a chunk is two
halves, and the scores of the next half, of this chunk or of the next one, are computed beside the weights of the one before.

The result leaves with a token's heads beside each other, as the product that follows contracts over them: head by head it would fill
half of a matrix unit that is deeper than a head.

Letters: T queries, S keys, Q query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention_gradient import HIDDEN, LANES, PARTLY, WHOLLY, beside
from pallas_kernels.shapes import full_precision, varying_like

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_COLUMNS = 256  # queries whose weights are computed together
_BY_QUERIES = (((1,), (1,)), ((), ()))  # both sides by rows: x @ y.T


def vmem_bytes(keys: int, width: int, itemsize: int, queries: int, chunk: int) -> int:
    """Bound of the vector memory that the kernel takes for blocks of `queries` and chunks of `chunk` keys. Blocks of operands and results
    are there twice; of scores there are up to two arrays, four where products of float32 take several of bfloat16."""
    lanes = pl.cdiv(width, LANES) * LANES
    per_key = 2 * 2 * lanes * itemsize + LANES * 4  # k and v; segments
    per_query = 2 * 2 * lanes * itemsize + 2 * lanes * 4 + 6 * 2 * 8 * 4  # q and the result; its sum, and this turned; numbers
    return keys * per_key + queries * per_query + itemsize * queries * chunk * 4


def attention_forward(
    q_BQTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_segment_BT: jax.Array,
    kv_segment_BS: jax.Array,
    q_index_BT: jax.Array,
    sight: jax.Array,
    *,
    causal: bool,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Weighted values, of the queries' dtype, [B, T, Q * H], or where heads do not lie `beside` each other [B, Q, T, H]; and the logarithm
    of the softmax's denominator [B, Q, T], float32. Products are in the operands' dtype, the rest in float32.

    Args:
      k_BKSH: scaled; query head i reads key/value head i // (Q/K).
      q_segment_BT, kv_segment_BS: a query sees keys of its own segment.
      q_index_BT: if `causal`, a query sees keys up to this one only.
      sight: what the queries of each block see of each chunk of keys, int32 [B, blocks, chunks] of `HIDDEN`, `PARTLY` and `WHOLLY`; each
        query sees a key of a chunk that is not hidden. Blocks and chunks are equal parts of T and S, multiples of 128.
    """
    (B, Q, T, H), (_, K, S, _), (_, blocks, chunks) = q_BQTH.shape, k_BKSH.shape, sight.shape
    R, queries, keys = Q // K, T // blocks, S // chunks

    # Chunks in the order of their visits, the hidden ones last.
    visits = jnp.argsort(sight == HIDDEN, axis=-1, stable=True).astype(jnp.int32)
    count = jnp.sum(sight > HIDDEN, axis=-1, dtype=jnp.int32)

    per_query = pl.BlockSpec((None, None, queries, H), lambda b, k, r, t, *_: (b, k * R + r, t, 0))
    per_key = pl.BlockSpec((None, None, S, H), lambda b, k, r, t, *_: (b, k, 0, 0))
    number = pl.BlockSpec((None, None, 1, queries), lambda b, k, r, t, *_: (b, k * R + r, 0, t))
    place_of_query = pl.BlockSpec((None, 1, queries), lambda b, k, r, t, *_: (b, 0, t))
    segments = pl.BlockSpec((None, S, LANES), lambda b, *_: (b, 0, 0), pipeline_mode=pl.Buffered(1))
    result = pl.BlockSpec((None, queries, H), lambda b, k, r, t, *_: (b, t, k * R + r)) if beside(H) else per_query

    out_shape = (B, T, Q * H) if beside(H) else q_BQTH.shape

    operands = (q_BQTH, k_BKSH, v_BKSH)
    # Blocks on the diagonal are computed whole; the longer side of a block sets how many there are.
    share = (1 + max(queries, keys) / S) / 2 if causal else 1.0
    scores = int(B * Q * T * S * share)
    out, log_z_BQ1T = pl.pallas_call(
        functools.partial(_kernel, causal=causal, keys=keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, R, blocks),
            in_specs=[per_query, per_key, per_key, place_of_query, segments, place_of_query],
            out_specs=(result, number),
            scratch_shapes=[pltpu.VMEM((rows, queries), jnp.float32) for rows in (H, 1, 1, keys // 2, keys // 2)],
        ),
        out_shape=(varying_like(out_shape, q_BQTH.dtype, *operands), varying_like((B, Q, 1, T), jnp.float32, *operands)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4,
            vmem_limit_bytes=vmem_bytes(S, H, k_BKSH.dtype.itemsize, queries, keys),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * scores * H,
            transcendentals=scores,
            bytes_accessed=2 * q_BQTH.nbytes + 2 * k_BKSH.nbytes + B * Q * T * 4,
        ),
        interpret=interpret,
        name="attention_forward",
    )(
        *(table.reshape(-1) for table in (visits, count, sight)), q_BQTH, k_BKSH, v_BKSH,
        q_segment_BT[:, None], jnp.broadcast_to(kv_segment_BS[..., None], (B, S, LANES)), q_index_BT[:, None],
    )  # fmt: skip
    return out, log_z_BQ1T[:, :, 0]


def _kernel(  # type: ignore[no-untyped-def]
    visits, count, sight, q, k, v, q_segment, kv_segment, q_index, out, log_z, total, top, denominator, *halves,
    causal: bool, keys: int,
) -> None:  # fmt: skip
    chunks, half = k.shape[0] // keys, keys // 2
    block = pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)
    columns = _COLUMNS if q.shape[0] % _COLUMNS == 0 else LANES
    product = functools.partial(jax.lax.dot_general, precision=full_precision(q.dtype), preferred_element_type=jnp.float32)

    total[...] = jnp.zeros_like(total)
    top[...] = jnp.full_like(top, -jnp.inf)
    denominator[...] = jnp.zeros_like(denominator)

    def scores_of(chunk: jax.Array, which: int) -> None:
        own = pl.ds(pl.multiple_of(chunk * keys + which * half, half), half)
        halves[which][...] = product(k[own], q[...], _BY_QUERIES)

    def add(chunk: jax.Array, which: int, masked: bool) -> None:
        start = pl.multiple_of(chunk * keys + which * half, half)
        own = pl.ds(start, half)
        for column in range(0, q.shape[0], columns):
            these = slice(column, column + columns)
            scores = halves[which][:, these]
            if masked:
                visible = jnp.tile(kv_segment[own], (1, columns // LANES)) == q_segment[:, these]
                if causal:
                    visible &= jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= q_index[:, these] - start
                scores = jnp.where(visible, scores, _MASKED)
            before = top[:, these]
            now = jnp.maximum(before, scores.max(0, keepdims=True))
            weights = jnp.exp(scores - now)
            kept = jnp.exp(before - now)
            top[:, these] = now
            denominator[:, these] = kept * denominator[:, these] + weights.sum(0, keepdims=True)
            total[:, these] = kept * total[:, these] + product(v[own], weights.astype(v.dtype), (((0,), (0,)), ((), ())))

    def both(chunk: jax.Array, following: jax.Array, masked: bool) -> None:
        """The scores of a half are computed while the weights of the other are."""
        scores_of(chunk, 1)
        add(chunk, 0, masked)
        scores_of(following, 0)
        add(chunk, 1, masked)

    scores_of(visits[block * chunks], 0)

    def step(place: jax.Array, _: None) -> None:
        chunk, following = (visits[block * chunks + at] for at in (place, jnp.minimum(place + 1, count[block] - 1)))
        state = sight[block * chunks + chunk]
        pl.when(state == WHOLLY)(lambda: both(chunk, following, masked=False))
        pl.when(state == PARTLY)(lambda: both(chunk, following, masked=True))

    jax.lax.fori_loop(0, count[block], step, None)
    out[...] = (total[...] / denominator[...]).T.astype(out.dtype)
    log_z[...] = top[...] + jnp.log(denominator[...])
