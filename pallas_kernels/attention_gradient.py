"""Gradients of attention on TPU in one kernel, for rows whose keys and values fit in vector memory.

A key/value head's keys, values and their gradients stay in vector memory while the queries that share it pass, block by block; each
block goes over the keys that it sees in chunks. So scores are computed once for all three gradients, in five products, no partial
gradient goes to memory, and chunks may be as fine as the products allow: nothing is loaded or stored per chunk.

Letters: T queries, S keys, Q query heads, K key/value heads, H head width; scores stand with keys before queries.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shapes import full_precision, varying_like

LANES = 128
HIDDEN, PARTLY, WHOLLY = 0, 1, 2  # what queries of a block see of a chunk of keys
LATER = 5  # only the later half of the queries sees some of it
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_BY_QUERIES = (((1,), (1,)), ((), ()))  # both sides by rows: x @ y.T
_LN2 = math.log(2)  # of the derivative of an exponential to the base of 2


def vmem_bytes(keys: int, width: int, itemsize: int, queries: int, chunk: int) -> int:
    """Bound of the vector memory that the kernel takes for blocks of `queries` and chunks of `chunk` keys. Blocks of operands and results
    are there twice; of scores there are up to two arrays, four where products of float32 take several of bfloat16."""
    lanes = pl.cdiv(width, LANES) * LANES
    per_key = 4 * 2 * lanes * itemsize + 2 * lanes * 4 + LANES * 4  # k, v and their gradients; sums of these; segments
    per_query = 4 * 2 * lanes * itemsize + 2 * lanes * 4 + 4 * 2 * 8 * 4  # q, the result and gradients; sums, and these turned; numbers
    return keys * per_key + queries * per_query + itemsize * queries * chunk * 4


def beside(width: int) -> bool:
    """Whether a token's heads of this width lie beside each other, [T, Q * H], in the result of attention and its gradient: else a head
    is no whole number of registers there, and heads come before tokens."""
    return width % LANES == 0


def has_later_half(queries: int) -> bool:
    """Whether `LATER` is known of blocks of so many queries: halves are whole registers."""
    return queries % (2 * LANES) == 0


def attention_gradient(
    q_BQTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    out: jax.Array,
    grad: jax.Array,
    log_z_BQT: jax.Array,
    q_segment_BT: jax.Array,
    kv_segment_BS: jax.Array,
    q_index_BT: jax.Array,
    sight: jax.Array,
    *,
    causal: bool,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients with respect to queries, keys and values, of their dtypes; products in the operands' dtype, the rest in float32.

    Args:
      k_BKSH: scaled as for `attention_forward`, so that scores are exponents of 2; query head i reads key/value head i // (Q/K).
      out, grad: the result and its gradient, [B, T, Q * H], or where heads do not lie `beside` each other [B, Q, T, H].
      log_z_BQT: logarithm to the base of 2 of the softmax's denominator, float32.
      q_segment_BT, kv_segment_BS: a query sees keys of its own segment.
      q_index_BT: if `causal`, a query sees keys up to this one only.
      sight: what the queries of each block see of each chunk of keys, int32 [B, blocks, chunks] of `HIDDEN`, `PARTLY`, `WHOLLY` and,
        if the block `has_later_half`, `LATER`; blocks and chunks are equal parts of T and S, multiples of 128.
    """
    (B, Q, T, H), (_, K, S, _), (_, blocks, chunks) = q_BQTH.shape, k_BKSH.shape, sight.shape
    R, queries, keys = Q // K, T // blocks, S // chunks

    place = jax.lax.broadcasted_iota(jnp.int32, sight.shape, 2)
    first = jnp.where(sight > HIDDEN, place, chunks).min(-1)
    end = jnp.where(sight > HIDDEN, place + 1, 0).max(-1)

    per_query = pl.BlockSpec((None, None, queries, H), lambda b, k, r, t, *_: (b, k * R + r, t, 0))
    per_key = pl.BlockSpec((None, None, S, H), lambda b, k, r, t, *_: (b, k, 0, 0))
    number = pl.BlockSpec((None, None, 1, queries), lambda b, k, r, t, *_: (b, k * R + r, 0, t))
    place_of_query = pl.BlockSpec((None, 1, queries), lambda b, k, r, t, *_: (b, 0, t))
    segments = pl.BlockSpec((None, S, LANES), lambda b, *_: (b, 0, 0), pipeline_mode=pl.Buffered(1))
    result = pl.BlockSpec((None, queries, H), lambda b, k, r, t, *_: (b, t, k * R + r)) if beside(H) else per_query

    operands = (q_BQTH, k_BKSH, v_BKSH, out, grad, log_z_BQT)
    # Of a row that is one document: what lies on the diagonal is computed whole, or of the later half of the queries.
    diagonal = queries // 2 if has_later_half(queries) and queries >= 2 * keys else max(queries, keys)
    share = (1 + diagonal / S) / 2 if causal else 1.0
    scores = int(B * Q * T * S * share)
    return pl.pallas_call(
        functools.partial(_kernel, causal=causal, keys=keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, R, blocks),
            in_specs=[
                per_query, per_key, per_key, result, result, number,
                place_of_query, segments, place_of_query,
            ],
            out_specs=(per_query, per_key, per_key),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((1, queries), (H, queries), (S, H), (S, H))],
        ),
        out_shape=tuple(varying_like(x.shape, x.dtype, *operands) for x in (q_BQTH, k_BKSH, v_BKSH)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(S, H, k_BKSH.dtype.itemsize, queries, keys),
        ),
        cost_estimate=pl.CostEstimate(
            flops=5 * 2 * scores * H,
            transcendentals=scores,
            bytes_accessed=4 * q_BQTH.nbytes + 4 * k_BKSH.nbytes + log_z_BQT.nbytes,
        ),
        interpret=interpret,
        name="attention_gradient",
    )(
        *(table.reshape(-1) for table in (first, end, sight)), q_BQTH, k_BKSH, v_BKSH, out, grad, log_z_BQT[:, :, None],
        q_segment_BT[:, None], jnp.broadcast_to(kv_segment_BS[..., None], (B, S, LANES)), q_index_BT[:, None],
    )  # fmt: skip


def _kernel(  # type: ignore[no-untyped-def]
    first, end, sight, q, k, v, out, grad, log_z, q_segment, kv_segment, q_index,
    grad_q, grad_k, grad_v, shift, sum_q, sum_k, sum_v, *, causal: bool, keys: int,
) -> None:  # fmt: skip
    queries, chunks, head, step_of_head = q.shape[0], k.shape[0] // keys, pl.program_id(2), pl.program_id(3)
    block = pl.program_id(0) * pl.num_programs(3) + step_of_head
    product = functools.partial(jax.lax.dot_general, precision=full_precision(q.dtype), preferred_element_type=jnp.float32)

    @pl.when((head == 0) & (step_of_head == 0))
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    sum_q[...] = jnp.zeros_like(sum_q)
    # What a query's gradients of weights are above that of its softmax's denominator.
    shift[...] = (grad[...].astype(jnp.float32) * out[...].astype(jnp.float32)).T.sum(0, keepdims=True)

    def add(chunk: jax.Array, masked: bool, first: int = 0) -> None:
        """Of queries from `first` on."""
        start = pl.multiple_of(chunk * keys, keys)
        own = pl.ds(start, keys)
        scores = product(k[own], q[first:], _BY_QUERIES)
        if masked:
            visible = jnp.tile(kv_segment[own], (1, scores.shape[1] // LANES)) == q_segment[:, first:]
            if causal:
                visible &= jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= q_index[:, first:] - start
            scores = jnp.where(visible, scores, _MASKED)
        weights = jnp.exp2(scores - log_z[:, first:])
        sum_v[own] += product(weights.astype(grad.dtype), grad[first:], (((1,), (0,)), ((), ())))
        grad_weights = product(v[own], grad[first:], _BY_QUERIES)
        grad_scores = (weights * (grad_weights - shift[:, first:])).astype(q.dtype)
        sum_k[own] += product(grad_scores, q[first:], (((1,), (0,)), ((), ())))
        # Transposed: that of the chunk's keys costs less than that of the scores.
        sum_q[:, first:] += product(k[own], grad_scores, (((0,), (0,)), ((), ())))

    def step(chunk: jax.Array, _: None) -> None:
        state = sight[block * chunks + chunk]
        pl.when(state == WHOLLY)(lambda: add(chunk, masked=False))
        pl.when(state == PARTLY)(lambda: add(chunk, masked=True))
        if has_later_half(queries):
            pl.when(state == LATER)(lambda: add(chunk, masked=True, first=queries // 2))

    jax.lax.fori_loop(first[block], end[block], step, None)
    grad_q[...] = (_LN2 * sum_q[...]).T.astype(grad_q.dtype)

    @pl.when((head == pl.num_programs(2) - 1) & (step_of_head == pl.num_programs(3) - 1))
    def _() -> None:
        grad_k[...] = (_LN2 * sum_k[...]).astype(grad_k.dtype)
        grad_v[...] = sum_v[...].astype(grad_v.dtype)
