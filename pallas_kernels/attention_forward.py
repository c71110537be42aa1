"""Attention on TPU for rows whose keys and values fit in vector memory.

A key/value head's keys and values stay in vector memory while the queries that share it pass, one head of a row at a time; each block of
queries goes over the chunks of keys that it sees. Scores stand with keys before queries, so that a query's maximum and sum go down the
rows of registers, without moving lanes, and its numbers lie along lanes as the result's denominators do. The sum of weighted values is
turned for the same reason, and since its product then fills matrix units that are wider than a head.

A query's weights need the largest score first, so that products and weights of one chunk follow each other. Therefore a chunk is two
halves, and the scores of the next half, of this chunk or of the next one, are computed beside the weights of the one before. The last
chunk of a block is followed by the first one of the next block, so that no block has to wait for its first scores.

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
_SUBLANES = 8
STAIRS, STAIRS_PARTLY = 3, 4  # see `attention_forward`
_BY_QUERIES = (((1,), (1,)), ((), ()))  # both sides by rows: x @ y.T


def columns_of(queries: int) -> int:
    """Queries of a block of so many whose weights are computed together."""
    return _COLUMNS if queries % _COLUMNS == 0 else LANES


def vmem_bytes(keys: int, width: int, itemsize: int, queries: int, chunk: int, row: int) -> int:
    """Bound of the vector memory that the kernel takes for rows of `row` queries in blocks of `queries` and chunks of `chunk` keys. Blocks
    of operands and results are there twice; of scores there are up to two arrays, four where products of float32 take several of
    bfloat16."""
    lanes = pl.cdiv(width, LANES) * LANES
    per_key = 2 * 2 * lanes * itemsize + LANES * 4  # k and v; segments
    per_query = 2 * 2 * lanes * itemsize + 3 * 2 * 8 * 4  # q and the result; numbers
    return keys * per_key + row * per_query + queries * (2 * lanes * 4 + 3 * 2 * 8 * 4) + itemsize * queries * chunk * 4


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
    to the base of 2 of the softmax's denominator [B, Q, T], float32. Products are in the operands' dtype, the rest in float32.

    Args:
      k_BKSH: scaled, and by log2(e) as well: scores are exponents of 2, which saves a multiplication of each; query head i reads key/value
        head i // (Q/K).
      q_segment_BT, kv_segment_BS: a query sees keys of its own segment.
      q_index_BT: if `causal`, a query sees keys up to this one only.
      sight: what the queries of each block see of each chunk of keys, int32 [B, blocks, chunks] of `HIDDEN`, `PARTLY`, `WHOLLY` and, where
        both have as many tokens and the queries of each of their `columns_of` see no keys behind those of the same place, `STAIRS_PARTLY`,
        or `STAIRS` if they see all keys before these. Each query sees a key of a chunk that is not hidden. Blocks and chunks are equal
        parts of T and S, multiples of 128.
    """
    (B, Q, T, H), (_, K, S, _), (_, blocks, chunks) = q_BQTH.shape, k_BKSH.shape, sight.shape
    R, queries, keys = Q // K, T // blocks, S // chunks

    # Blocks and chunks in the order of their visits, the hidden ones last.
    states = sight.reshape(B, blocks * chunks)
    order = jnp.argsort(states == HIDDEN, axis=-1, stable=True).astype(jnp.int32)
    passes = _packed(order // chunks, order % chunks, jnp.take_along_axis(states, order, -1))
    count = jnp.sum(states > HIDDEN, axis=-1, dtype=jnp.int32)

    per_query = pl.BlockSpec((None, None, T, H), lambda b, k, r, *_: (b, k * R + r, 0, 0))
    per_key = pl.BlockSpec((None, None, S, H), lambda b, k, r, *_: (b, k, 0, 0))
    number = pl.BlockSpec((None, None, 1, T), lambda b, k, r, *_: (b, k * R + r, 0, 0))
    place_of_query = pl.BlockSpec((None, 1, T), lambda b, *_: (b, 0, 0))
    segments = pl.BlockSpec((None, S, LANES), lambda b, *_: (b, 0, 0), pipeline_mode=pl.Buffered(1))
    result = pl.BlockSpec((None, T // _SUBLANES, _SUBLANES, H), lambda b, k, r, *_: (b, 0, 0, k * R + r)) if beside(H) else per_query

    # Rows by eights, as registers hold them: XLA would lay out the result by sixteens for the product, and copy it for the gradients.
    out_shape = (B, T // _SUBLANES, _SUBLANES, Q * H) if beside(H) else q_BQTH.shape

    operands = (q_BQTH, k_BKSH, v_BKSH)
    # Of a row that is one document: what lies on the diagonal is computed whole.
    diagonal = columns_of(queries) if queries == keys else max(queries, keys)
    share = (1 + diagonal / S) / 2 if causal else 1.0
    scores = int(B * Q * T * S * share)
    out, log_z_BQ1T = pl.pallas_call(
        functools.partial(_kernel, causal=causal, queries=queries, keys=keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, R),
            in_specs=[per_query, per_key, per_key, place_of_query, segments, place_of_query],
            out_specs=(result, number),
            scratch_shapes=[pltpu.VMEM((rows, queries), jnp.float32) for rows in (H, 1, 1, keys // 2, keys // 2)],
        ),
        out_shape=(varying_like(out_shape, q_BQTH.dtype, *operands), varying_like((B, Q, 1, T), jnp.float32, *operands)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3,
            vmem_limit_bytes=vmem_bytes(S, H, k_BKSH.dtype.itemsize, queries, keys, T),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * scores * H,
            transcendentals=scores,
            bytes_accessed=2 * q_BQTH.nbytes + 2 * k_BKSH.nbytes + B * Q * T * 4,
        ),
        interpret=interpret,
        name="attention_forward",
    )(
        passes.reshape(-1), count, q_BQTH, k_BKSH, v_BKSH,
        q_segment_BT[:, None], jnp.broadcast_to(kv_segment_BS[..., None], (B, S, LANES)), q_index_BT[:, None],
    )  # fmt: skip
    return out.reshape(B, T, Q * H) if beside(H) else out, log_z_BQ1T[:, :, 0]


def _packed(block: jax.Array, chunk: jax.Array, state: jax.Array) -> jax.Array:
    return block << 16 | chunk << 3 | state


def _unpacked(code: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return code >> 16, code >> 3 & (1 << 13) - 1, code & 7


def _extent(state: int, start: int, half: int, column: int, columns: int) -> tuple[int, int]:
    """Of the half of a chunk that begins at key `start` of it: how many keys the queries from `column` on see, and how many of these need
    no mask."""
    if state in (WHOLLY, PARTLY):
        return half, half if state == WHOLLY else 0
    seen, plain = (min(max(end - start, 0), half) for end in (column + columns, column))
    return seen, plain if state == STAIRS else 0


def _kernel(  # type: ignore[no-untyped-def]
    passes, count, q, k, v, q_segment, kv_segment, q_index, out, log_z, total, top, denominator, *halves,
    causal: bool, queries: int, keys: int,
) -> None:  # fmt: skip
    row, half, columns = pl.program_id(0), keys // 2, columns_of(queries)
    most = q.shape[0] // queries * (k.shape[0] // keys)
    product = functools.partial(jax.lax.dot_general, precision=full_precision(q.dtype), preferred_element_type=jnp.float32)

    def reset() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        denominator[...] = jnp.zeros_like(denominator)

    def part(block: jax.Array, column: int, size: int) -> slice | pl.Slice:
        return pl.ds(pl.multiple_of(block * queries + column, LANES), size)

    def scores_of(block: jax.Array, chunk: jax.Array, which: int, state: int, column: int) -> None:
        seen, _ = _extent(state, which * half, half, column, columns)
        if seen:
            own = pl.ds(pl.multiple_of(chunk * keys + which * half, half), seen)
            halves[which][:seen, column : column + columns] = product(k[own], q[part(block, column, columns)], _BY_QUERIES)

    def add(block: jax.Array, chunk: jax.Array, which: int, state: int, column: int) -> None:
        start, these = pl.multiple_of(chunk * keys + which * half, half), slice(column, column + columns)
        seen, plain = _extent(state, which * half, half, column, columns)
        if not seen:
            return
        scores = halves[which][:seen, these]
        if plain < seen:
            own = part(block, column, columns)
            masked = scores[plain:]
            visible = jnp.tile(kv_segment[pl.ds(start + plain, seen - plain)], (1, columns // LANES)) == q_segment[:, own]
            if causal:
                visible &= jax.lax.broadcasted_iota(jnp.int32, masked.shape, 0) <= q_index[:, own] - (start + plain)
            masked = jnp.where(visible, masked, _MASKED)
            scores = jnp.concatenate([scores[:plain], masked]) if plain else masked
        before = top[:, these]
        now = jnp.maximum(before, scores.max(0, keepdims=True))
        weights = jnp.exp2(scores - now)
        kept = jnp.exp2(before - now)
        top[:, these] = now
        denominator[:, these] = kept * denominator[:, these] + weights.sum(0, keepdims=True)
        values = product(v[pl.ds(start, seen)], weights.astype(v.dtype), (((0,), (0,)), ((), ())))
        total[:, these] = kept * total[:, these] + values

    def both(block: jax.Array, chunk: jax.Array, next_block: jax.Array, next_chunk: jax.Array, state: int) -> None:
        """The scores of a half are computed while the weights of the other are."""
        for column in range(0, queries, columns):
            scores_of(block, chunk, 1, state, column)
            add(block, chunk, 0, state, column)
        for column in range(0, queries, columns):
            scores_of(next_block, next_chunk, 0, PARTLY, column)
            add(block, chunk, 1, state, column)

    def finish(block: jax.Array) -> None:
        own = part(block, 0, queries)
        mean = (total[...] / denominator[...]).T
        if beside(q.shape[1]):
            size = queries // _SUBLANES
            out[pl.ds(block * size, size)] = mean.reshape(size, _SUBLANES, -1).astype(out.dtype)
        else:
            out[own] = mean.astype(out.dtype)
        log_z[:, own] = top[...] + jnp.log2(denominator[...])
        reset()

    def step(place: jax.Array, code: jax.Array) -> jax.Array:
        following = passes[row * most + jnp.minimum(place + 1, count[row] - 1)]
        (block, chunk, state), (next_block, next_chunk, _) = _unpacked(code), _unpacked(following)
        for way in (WHOLLY, PARTLY, *((STAIRS, STAIRS_PARTLY) if causal and queries == keys else ())):
            pl.when(state == way)(functools.partial(both, block, chunk, next_block, next_chunk, way))
        pl.when((place + 1 == count[row]) | (next_block != block))(functools.partial(finish, block))
        return following

    total[...] = jnp.zeros_like(total)
    reset()
    first = passes[row * most]
    for column in range(0, queries, columns):
        scores_of(*_unpacked(first)[:2], 0, PARTLY, column)
    jax.lax.fori_loop(0, count[row], step, first)
