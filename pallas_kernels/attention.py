"""Attention on TPU: the splash kernel that comes with JAX, visiting only blocks of scores that the row's documents need.

Splash computes the scores of a block of queries and a block of keys at a time, forward and backward, and takes from tables in scalar
memory which blocks to visit. Its own tables come from a mask that is known when the program is traced. Here they are made on the
device, from the segments and indices of the very row: a block is visited if some of its queries may see some of its keys. So the work
is that of the documents' own triangles, a packed row costs what its documents cost, and queries may be any part of the row (a device's
share of it, for one).

Letters: T queries, S keys, Q query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.chips import Chip

LANES = 128
_UNROLLED = 4  # rows up to which there is no loop, whose body would have to copy what it reads, writes and keeps for the backward pass
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_NO_SEGMENT = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Largest blocks of scores: queries, keys that are loaded together, and keys of one product; forward and backward.

    Attributes:
      fused: key blocks of a row up to which one backward kernel gives all three gradients, with five products instead of seven. It
        writes the queries' gradient once for each block of keys, so that long rows would take many times the memory of the queries.
    """

    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    fused: int = 4


# They compile within the vector memory that XLA gives a kernel by default (v5e, which is not compiled for, as v5p). Not tuned on a chip.
_TILINGS = {
    "v5e": Tiling((1024, 1024, 512), (512, 1024, 512)),
    "v5p": Tiling((1024, 1024, 512), (512, 1024, 512)),
    "v6e": Tiling((1024, 2048, 512), (1024, 1024, 512)),
    "tpu7x": Tiling((1024, 2048, 512), (1024, 1024, 512)),
}


def tiling_of(chip: Chip) -> Tiling:
    return _TILINGS[chip.name]


def attention(
    q_BTQH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segment_BT: jax.Array,
    kv_segment_BS: jax.Array,
    q_index_BT: jax.Array,
    *,
    causal: bool,
    scale: float,
    tiling: Tiling,
    runs: int = 1,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of queries over the keys of their segment, `[B, T, Q, H]`; products in the operands' dtype, softmax in float32.

    Args:
      q_segment_BT, kv_segment_BS: a query sees keys of its own segment; 0 is padding, which sees padding.
      q_index_BT: where each query stands among the keys: key `q_index` is its own, of the same segment.
      causal: a query sees keys up to its own only.
      runs: equal parts of the queries that follow each other in the array but not in the row; no block spans two of them, which would
        have it visit all the keys between.
      name: for rematerialisation policies: what the backward needs of the forward is saved under this name.

    T / runs and S must be multiples of 128. Inside `jax.shard_map` it needs `check_vma=False`: splash does not type its results.
    """
    T, S = q_BTQH.shape[1], k_BSKH.shape[1]
    sizes = _block_sizes(T // runs, S, tiling)
    # Scores are scaled by way of the keys, which are fewer than the queries where heads are grouped.
    scaled = (k_BSKH.astype(jnp.float32) * scale).astype(k_BSKH.dtype)

    def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q_QTH, k_KSH, v_KSH, q_segment_T, kv_segment_S, q_index_T = arrays

        def seen(queries: int | None, keys: int | None) -> jax.Array:
            assert queries is not None and keys is not None
            return _seen(q_segment_T, kv_segment_S, q_index_T, queries, keys, causal)

        index = q_index_T if causal else None
        forward = _by_keys(seen(sizes.block_q, sizes.block_kv), index)
        kernel = SplashAttentionKernel(
            forward,
            None if sizes.use_fused_bwd_kernel else _by_keys(seen(sizes.block_q_dq, sizes.block_kv_dq), index),
            _by_queries(seen(sizes.block_q_dkv, sizes.block_kv_dkv), index),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=_MASKED,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=name,
            mask_function=_up_to_own if causal else None,
            interpret=interpret,
        )
        out_QTH = kernel(q_QTH, k_KSH, v_KSH, segment_ids=SegmentIds(q_segment_T, kv_segment_S))
        assert isinstance(out_QTH, jax.Array)  # no residuals
        return out_QTH

    # Outside the loop over rows is all that need not be in it: what it keeps for the backward pass it copies.
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTQH, scaled, v_BSKH))
    arrays = (*heads_first, q_segment_BT, kv_segment_BS, q_index_BT)
    rows = len(q_BTQH)
    one_by_one = rows <= _UNROLLED
    out_BQTH = jnp.stack([row(tuple(x[i] for x in arrays)) for i in range(rows)]) if one_by_one else jax.lax.map(row, arrays)
    return jnp.swapaxes(out_BQTH, 1, 2)


def _block_sizes(queries: int, keys: int, tiling: Tiling) -> BlockSizes:
    """The tiling, with blocks no larger than the tiling's that divide the lengths."""

    def fit(length: int, most: int) -> int:
        return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)

    (q, kv, compute), (q_grad, kv_grad, compute_grad) = tiling.forward, tiling.backward
    kv, kv_grad = fit(keys, kv), fit(keys, kv_grad)
    fused = keys // kv_grad <= tiling.fused
    return BlockSizes(
        block_q=fit(queries, q),
        block_kv=kv,
        block_kv_compute=fit(kv, compute),
        block_q_dkv=fit(queries, q_grad),
        block_kv_dkv=kv_grad,
        block_kv_dkv_compute=fit(kv_grad, compute_grad),
        block_q_dq=None if fused else fit(queries, q_grad),
        block_kv_dq=None if fused else kv_grad,
        use_fused_bwd_kernel=fused,
    )


def _up_to_own(q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
    return q_index >= kv_index


def _seen(q_segment_T: jax.Array, kv_segment_S: jax.Array, q_index_T: jax.Array, queries: int, keys: int, causal: bool) -> jax.Array:
    """Which blocks of `queries` x `keys` scores to visit, bool [T / queries, S / keys].

    Blocks see each other if their ranges of segments overlap (padding left out) and the last query is not before the first key. A
    block that holds a query's own key is always visited: then no softmax is empty, not even that of padding.
    """

    def bounds(segment: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        segment = segment.reshape(-1, size)
        return jnp.where(segment > 0, segment, _NO_SEGMENT).min(1), segment.max(1)

    (q_low, q_high), (kv_low, kv_high) = bounds(q_segment_T, queries), bounds(kv_segment_S, keys)
    index = q_index_T.reshape(-1, queries)
    first, last = index.min(1)[:, None], index.max(1)[:, None]
    start = jnp.arange(0, len(kv_segment_S), keys)
    seen = (q_low[:, None] <= kv_high) & (kv_low <= q_high[:, None])
    if causal:
        seen &= start <= last
    own = (start <= last) & (first < start + keys)
    return seen | own


def _following(seen: jax.Array, axis: int) -> jax.Array:
    """For each block the next one along the axis that is visited (itself, if it is), which is loaded ahead; behind the last one, that."""
    size = seen.shape[axis]
    place = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis)
    following = jax.lax.cummin(jnp.where(seen, place, size), axis, reverse=True)
    last = jnp.where(seen, place, 0).max(axis, keepdims=True)
    small = jnp.int8 if size <= jnp.iinfo(jnp.int8).max else jnp.int16  # scalar memory is small
    return jnp.where(following < size, following, last).astype(small)


def _table(seen: jax.Array, axis: int, q_index: jax.Array | None) -> MaskInfo:
    following, visited = _following(seen, axis)[None], seen.astype(jnp.int8)[None]
    # Its annotations know tables of static masks only.
    return MaskInfo(following, None, visited, None, q_index)  # type: ignore[arg-type]


def _by_keys(seen: jax.Array, q_index: jax.Array | None) -> MaskInfo:
    """Tables of a kernel whose innermost loop is over keys."""
    return _table(seen, 1, q_index)


def _by_queries(seen: jax.Array, q_index: jax.Array | None) -> MaskInfo:
    """Tables of a kernel whose innermost loop is over queries."""
    return _table(seen, 0, q_index)
