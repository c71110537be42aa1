"""Attention on TPU: the splash kernels that come with JAX, visiting only blocks of scores that the row's documents need, and kernels of
our own where a row's keys fit in vector memory.

Splash computes the scores of a block of queries and a block of keys at a time, forward and backward, and takes from tables in scalar
memory which blocks to visit. Its own tables come from a mask that is known when the program is traced. Here they are made on the
device, from the segments and indices of the very row: a block is visited if some of its queries may see some of its keys. So the work
is that of the documents' own triangles, a packed row costs what its documents cost, and queries may be any part of the row (a device's
share of it, for one).

Letters: T queries, S keys, Q query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels import attention_forward, attention_gradient
from pallas_kernels.attention_forward import STAIRS, STAIRS_PARTLY
from pallas_kernels.attention_gradient import HIDDEN, LATER, PARTLY, WHOLLY
from pallas_kernels.chips import CHIPS, MIB, Chip

LANES = 128
_TABLE = 1 << 18  # bytes of scalar memory, which has 1 MiB, that the table of what blocks see may take
_UNROLLED = 6  # rows up to which there is no loop, whose body would have to copy what it reads, writes and keeps for the backward pass
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
Interpret = bool | pltpu.InterpretParams
_NO_SEGMENT = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Largest blocks of scores.

    Attributes:
      forward, backward: of splash: queries, keys that are loaded together, and keys of one product.
      vmem: bytes of vector memory that our kernels may take; rows for which they would take more have splash's.
      short: of `attention_forward`: queries, and keys of a chunk.
      gradient: of `attention_gradient`: queries, and keys of a chunk.
    """

    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    vmem: int
    short: tuple[int, int] = (1024, 1024)
    gradient: tuple[int, int] = (1024, 512)


# Splash's blocks compile within the vector memory that XLA gives a kernel by default; those of v5e are v5p's, not compiled for v5e itself.
# The blocks of our kernels were chosen by hand from a few compiled schedules of rows of 4,096, and nothing was tuned on a chip.
_TILINGS = {
    "v5e": Tiling((1024, 1024, 512), (512, 1024, 512), CHIPS["v5e"].vmem - MIB),
    "v5p": Tiling((1024, 1024, 512), (512, 1024, 512), CHIPS["v5p"].vmem - MIB),
    "v6e": Tiling((1024, 2048, 512), (1024, 1024, 512), CHIPS["v6e"].vmem - MIB),
    "tpu7x": Tiling((1024, 2048, 512), (1024, 1024, 512), CHIPS["tpu7x"].vmem - MIB),
}


def tiling_of(chip: Chip) -> Tiling:
    return _TILINGS[chip.name]


def is_short(length: int, width: int, dtype: str, chip: Chip) -> bool:
    """Whether a row of so many tokens, with heads of this width, has our kernels on this chip; longer ones have splash's."""
    keys = jax.ShapeDtypeStruct((1, length, 1, width), jnp.dtype(dtype))
    return _plan(length, 1, keys, tiling_of(chip), causal=True, name=None, interpret=False).short is not None


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
    interpret: Interpret = False,
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
    B, T, Q, H = q_BTQH.shape
    plan = _plan(T, runs, k_BSKH, tiling, causal, name, interpret)
    # Scores are scaled by way of the keys, which are fewer than the queries where heads are grouped; our kernels' are exponents of 2.
    scaled = (k_BSKH.astype(jnp.float32) * (scale if plan.short is None else scale * math.log2(math.e))).astype(k_BSKH.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTQH, scaled, v_BSKH))
    arrays = (*heads_first, q_segment_BT, kv_segment_BS, q_index_BT)
    if plan.short is None:
        one_by_one = B <= _UNROLLED
        rows = functools.partial(_splash, plan)
        out = jnp.stack([rows(tuple(x[i] for x in arrays)) for i in range(B)]) if one_by_one else jax.lax.map(rows, arrays)
    else:
        out = _attention(plan, *arrays)
    return out.reshape(B, T, Q, H) if out.ndim == 3 else jnp.swapaxes(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Queries and keys of a block of scores of our kernels, forward and for the gradients."""

    forward: tuple[int, int]
    gradient: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Blocks and options: `short` where our kernels are used, else `long` for splash."""

    short: _Blocks | None
    long: BlockSizes
    causal: bool
    name: str | None
    interpret: Interpret


def _plan(
    length: int, runs: int, k_BSKH: jax.Array | jax.ShapeDtypeStruct, tiling: Tiling, causal: bool, name: str | None, interpret: Interpret
) -> _Plan:
    """The tiling, with blocks no larger than the tiling's that divide the lengths. Our forward kernel is used only where that of the
    gradients fits as well: one decision for both."""

    def fit(length: int, most: int) -> int:
        return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)

    def fit_both(blocks: tuple[int, int]) -> tuple[int, int]:
        return fit(queries, blocks[0]), fit(keys, blocks[1])

    def within_memory(bytes_of: Callable[..., int], most: tuple[int, int]) -> tuple[int, int] | None:
        """Blocks that are within the memory, if need be of fewer queries, and of all rows within that of scalars."""
        blocks = fit_both(most)
        if 4 * rows * (length // blocks[0]) * (keys // blocks[1]) > _TABLE:
            return None
        if bytes_of(keys, width, k_BSKH.dtype.itemsize, *blocks) <= tiling.vmem:
            return blocks
        return within_memory(bytes_of, (most[0] // 2, most[1])) if most[0] > LANES else None

    queries, (rows, keys, _, width) = length // runs, k_BSKH.shape
    forward = within_memory(functools.partial(attention_forward.vmem_bytes, row=length), tiling.short)
    gradient = within_memory(attention_gradient.vmem_bytes, tiling.gradient)
    short = _Blocks(forward, gradient) if forward and gradient else None
    (q, kv), (q_back, kv_back) = fit_both(tiling.forward[:2]), fit_both(tiling.backward[:2])
    long = BlockSizes(
        q, kv, fit(kv, tiling.forward[2]), q_back, kv_back, fit(kv_back, tiling.backward[2]), block_q_dq=q_back, block_kv_dq=kv_back
    )  # fmt: skip
    return _Plan(short, long, causal, name, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, *arrays: jax.Array) -> jax.Array:
    """The result of our kernels, as `attention_forward` gives it."""
    return _whole_rows(plan, *arrays)[0]


def _forward(plan: _Plan, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, log_z_BQT = _whole_rows(plan, *arrays)
    if plan.name is not None:
        out, log_z_BQT = checkpoint_name(out, plan.name), checkpoint_name(log_z_BQT, plan.name)
    return out, (*arrays, out, log_z_BQT)


def _backward(plan: _Plan, saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BQTH, k_BKSH, v_BKSH, q_segment_BT, kv_segment_BS, q_index_BT, out, log_z_BQT = saved
    assert plan.short is not None
    # Padding sees nothing here, as by its definition: its weights could be of keys that the forward has not visited.
    q_segment_BT = jnp.where(q_segment_BT > 0, q_segment_BT, -1)
    places = (q_segment_BT, kv_segment_BS, q_index_BT)
    queries, keys = plan.short.gradient
    sight = _of_rows(_sight, places, queries, keys, plan.causal)
    if attention_gradient.has_later_half(queries):
        halves = _of_rows(_sight, places, queries // 2, keys, plan.causal)
        sight = jnp.where((sight == PARTLY) & (halves[:, ::2] == HIDDEN), LATER, sight)
    gradients = attention_gradient.attention_gradient(
        q_BQTH, k_BKSH, v_BKSH, out, grad, log_z_BQT, *places, sight, causal=plan.causal, interpret=plan.interpret
    )
    return *gradients, None, None, None


_attention.defvjp(_forward, _backward)


def _whole_rows(
    plan: _Plan, q_BQTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, q_segment_BT: jax.Array, kv_segment_BS: jax.Array,
    q_index_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The result and the logarithm of the softmax's denominator, by our kernel."""
    assert plan.short is not None
    blocks, causal = plan.short.forward, plan.causal
    places = (q_segment_BT, kv_segment_BS, q_index_BT)
    # Padding needs no more than a block with its own key, as by splash.
    needed = (jnp.where(q_segment_BT > 0, q_segment_BT, -1), kv_segment_BS, q_index_BT)
    sight = _of_rows(_sight, needed, *blocks, causal)
    sight = jnp.where(_of_rows(_seen, places, *blocks, causal), jnp.maximum(sight, PARTLY), sight)
    if causal and blocks[0] == blocks[1]:
        stairs = _of_rows(_stairs, needed, blocks[0], attention_forward.columns_of(blocks[0]))
        sight = jnp.where(sight == PARTLY, jnp.maximum(sight, stairs), sight)
    return attention_forward.attention_forward(q_BQTH, k_BKSH, v_BKSH, *places, sight, causal=causal, interpret=plan.interpret)


def _of_rows(table: Callable[..., jax.Array], places: tuple[jax.Array, ...], *options: Any) -> jax.Array:
    return jax.vmap(lambda *row: table(*row, *options))(*places)


def _splash(plan: _Plan, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """The result of one row, [Q, T, H]; differentiable."""
    *operands, q_segment_T, kv_segment_S, q_index_T = arrays
    sizes, index = plan.long, q_index_T if plan.causal else None

    def seen(queries: int | None, keys: int | None) -> jax.Array:
        assert queries is not None and keys is not None
        return _seen(q_segment_T, kv_segment_S, q_index_T, queries, keys, plan.causal)

    kernel = SplashAttentionKernel(
        _by_keys(seen(sizes.block_q, sizes.block_kv), index),
        _by_keys(seen(sizes.block_q_dq, sizes.block_kv_dq), index),
        _by_queries(seen(sizes.block_q_dkv, sizes.block_kv_dkv), index),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=_MASKED,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=plan.name,
        mask_function=_up_to_own if plan.causal else None,
        interpret=plan.interpret,
    )
    out_QTH = kernel(*operands, segment_ids=SegmentIds(q_segment_T, kv_segment_S))
    assert isinstance(out_QTH, jax.Array)  # no residuals beside it
    return out_QTH


def _up_to_own(q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
    return q_index >= kv_index


def _seen(q_segment_T: jax.Array, kv_segment_S: jax.Array, q_index_T: jax.Array, queries: int, keys: int, causal: bool) -> jax.Array:
    """Which blocks of `queries` x `keys` scores to visit, bool [T / queries, S / keys].

    Besides those that may have a score that counts, a block that holds a query's own key is visited: then no softmax is empty, not even
    that of padding.
    """
    index = q_index_T.reshape(-1, queries)
    start = jnp.arange(0, len(kv_segment_S), keys)
    own = (start <= index.max(1)[:, None]) & (index.min(1)[:, None] < start + keys)
    return _related(q_segment_T, kv_segment_S, q_index_T, queries, keys, causal) | own


def _related(q_segment_T: jax.Array, kv_segment_S: jax.Array, q_index_T: jax.Array, queries: int, keys: int, causal: bool) -> jax.Array:
    """Blocks whose ranges of segments overlap (padding left out) and whose last query is not before the first key."""

    def bounds(segment: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        segment = segment.reshape(-1, size)
        return jnp.where(segment > 0, segment, _NO_SEGMENT).min(1), segment.max(1)

    (q_low, q_high), (kv_low, kv_high) = bounds(q_segment_T, queries), bounds(kv_segment_S, keys)
    related = (q_low[:, None] <= kv_high) & (kv_low <= q_high[:, None])
    if causal:
        related &= jnp.arange(0, len(kv_segment_S), keys) <= q_index_T.reshape(-1, queries).max(1)[:, None]
    return related


def _sight(q_segment_T: jax.Array, kv_segment_S: jax.Array, q_index_T: jax.Array, queries: int, keys: int, causal: bool) -> jax.Array:
    """What our kernels are told of each block: all of one document and before all of its queries, it needs no mask."""
    q_segment, kv_segment = q_segment_T.reshape(-1, queries), kv_segment_S.reshape(-1, keys)
    one = (q_segment == q_segment[:, :1]).all(1)[:, None] & (kv_segment == kv_segment[:, :1]).all(1)
    wholly = one & (q_segment[:, :1] == kv_segment[:, 0])
    if causal:
        wholly &= jnp.arange(keys - 1, len(kv_segment_S), keys) <= q_index_T.reshape(-1, queries).min(1)[:, None]
    partly = _related(q_segment_T, kv_segment_S, q_index_T, queries, keys, causal)
    return jnp.where(wholly, WHOLLY, jnp.where(partly, PARTLY, HIDDEN))


def _stairs(q_segment_T: jax.Array, kv_segment_S: jax.Array, q_index_T: jax.Array, size: int, cell: int) -> jax.Array:
    """Which blocks of `size` x `size` scores `attention_forward` may compute as stairs of `cell`: `STAIRS`, `STAIRS_PARTLY` or 0."""
    step = jnp.arange(size // cell)
    last = q_index_T.reshape(-1, 1, len(step), cell).max(-1)  # [blocks, 1, cells]
    start = jnp.arange(0, len(kv_segment_S), size)[:, None]
    partly = (last < start + (step + 1) * cell).all(-1)
    cells = _sight(q_segment_T, kv_segment_S, q_index_T, cell, cell, True).reshape(len(last), len(step), len(start), len(step))
    before = step[:, None] > step
    wholly = ((cells == WHOLLY) | ~before[:, None]).all((1, 3))
    return jnp.where(partly, jnp.where(wholly, STAIRS, STAIRS_PARTLY), 0)


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
