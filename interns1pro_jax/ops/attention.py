"""Scaled dot-product attention with grouped query heads, document segments and bounded memory.

`dot_product_attention` is the entry. On TPU it is kernels of our own or splash (`pallas_kernels.attention`), elsewhere and
for short or odd lengths `chunked_attention`; `dot_product_attention_reference` is the definition.

The chunked form takes queries in chunks, so that scores exist for one chunk at a time, forward and backward: the backward pass
recomputes them from the logarithm of each row's softmax denominator. Where the causal order is that of the array, later keys are skipped.

Letters: R query heads of a key/value head (Q = K * R), C queries of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from interns1pro_jax.ops import context
from interns1pro_jax.ops.layout import transposed_copy
from pallas_kernels import attention as tpu
from pallas_kernels.chips import current_chip

# Names for rematerialisation policies: what the backward needs of the forward, and the operands.
OUTPUT = "attention_output"
OPERANDS = ("query", "key", "value")

_MASKED = float(jnp.finfo(jnp.float32).min)

# Causal queries are cut into spans, and a span reads the keys up to its end: with 8 spans, 1/8 of the scores are in vain.
_SPANS = 8
_SHORTEST_SPAN = 64
_LONGEST_CHUNK = 512


def dot_product_attention(
    q_BTQH: Float[Array, "B T Q H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "B T"] | None = None,
    causal: bool,
    scale: float | None = None,
) -> Float[Array, "B T Q H"]:
    """Attention of T queries over S keys; query head i reads key/value head i // (Q/K). Softmax in fp32.

    Arrays may be split along B. Queries, keys and values may be split along their rows as well (over the mesh axis `context`, in the
    order of `ops.context`): each device then gathers the keys and values, which grouped heads make few, and keeps its queries, scores
    and results to itself.

    Args:
      q_segment_ids, kv_segment_ids: a query sees keys of its own segment; 0 is padding, which sees and is seen by nothing. Those of
        the keys are whole rows in reading order, whatever splits the keys. (The kernel lets padding see padding: to blank its results
        would be a pass over all of them, or slow down the product that follows. Nothing made of them may count in a loss.)
      q_index: where each query stands among the keys: key `q_index` is its own, of the same segment. Default 0, 1, ..., or where rows
        are split, what their order says.
      causal: a query sees the keys up to its own only.
      scale: factor on the scores; default H**-0.5.

    Returns:
      Weighted values, split as the queries are; for padding zeros, or from the kernel a mean of the values of padding.

    Raises:
      ValueError: `q_index` for rows that are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    scale = q_BTQH.shape[-1] ** -0.5 if scale is None else scale
    if mesh.empty or mesh.are_all_axes_manual:
        return _local_attention(q_BTQH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, q_index, causal=causal, scale=scale, split=False)
    q_spec, kv_spec = (jax.typeof(x).sharding.spec for x in (q_BTQH, k_BSKH))
    rows, split = PartitionSpec(q_spec[0], None), bool(kv_spec[1]) and mesh.shape[context.AXIS] > 1
    if split and q_index is not None:
        raise ValueError(
            f"q_index with keys that are split over the mesh axis {context.AXIS}: where their queries stand follows from the order of "
            "ops.context; leave q_index out, or gather the keys."
        )
    ids_spec = PartitionSpec(*q_spec[:2])
    q_segment_ids, kv_segment_ids = jax.sharding.reshard((q_segment_ids, kv_segment_ids), (ids_spec, rows))
    q_index = None if q_index is None else jax.sharding.reshard(q_index, ids_spec)
    # Kernels are not partitioned, and splash does not type its results; all operands vary over all axes that split any of them.
    return jax.shard_map(
        functools.partial(_local_attention, causal=causal, scale=scale, split=split),
        in_specs=(q_spec, kv_spec, kv_spec, ids_spec, rows, ids_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTQH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, q_index)


def _local_attention(
    q_BTQH: Array, k_BSKH: Array, v_BSKH: Array, q_segment_ids: Array, kv_segment_ids: Array, q_index: Array | None,
    *, causal: bool, scale: float, split: bool,
) -> Array:  # fmt: skip
    """A device's share, by the kernel where it can be."""
    B, T = q_BTQH.shape[:2]
    runs = 2 if split else 1  # of consecutive tokens, in the order of `ops.context`
    if split:
        with jax.named_scope("kv_all_gather"):
            k_BSKH, v_BSKH = jnp.split(context.all_gather(jnp.concatenate([k_BSKH, v_BSKH], 2)), 2, 2)
        q_index = jnp.broadcast_to(context.own_indices(T), (B, T))
    # The kernel's blocks are whole lanes; rows shorter than one are not worth its tables.
    if (chip := current_chip()) and T % (runs * tpu.LANES) == 0 and k_BSKH.shape[1] % tpu.LANES == 0:
        index = jnp.broadcast_to(jnp.arange(T), (B, T)) if q_index is None else q_index
        return tpu.attention(
            q_BTQH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, index,
            causal=causal, scale=scale, tiling=tpu.tiling_of(chip), runs=runs, name=OUTPUT,
        )  # fmt: skip
    return chunked_attention(
        q_BTQH, k_BSKH, v_BSKH, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, q_index=q_index, causal=causal, scale=scale
    )


def chunked_attention(
    q_BTQH: Float[Array, "B T Q H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "B T"] | None = None,
    causal: bool,
    scale: float | None = None,
) -> Float[Array, "B T Q H"]:
    """`dot_product_attention` of one device's arrays in plain JAX. Here a query's own key need not be among the keys: a query that sees
    none gets zero."""
    B, T, Q, H = q_BTQH.shape
    S, K = k_BSKH.shape[1:3]
    queries = _Places.of(q_segment_ids, q_index, causal)
    keys = _Places.of(kv_segment_ids, None, causal)
    scale = H**-0.5 if scale is None else scale
    q_BTKRH = q_BTQH.reshape(B, T, K, Q // K, H)
    if not (causal and q_index is None):
        return _attend(scale, q_BTKRH, k_BSKH, v_BSKH, queries, keys).reshape(B, T, Q, H)
    span = max(_SHORTEST_SPAN, -(-T // _SPANS))
    outs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        seen = slice(0, min(end, S))
        outs.append(_attend(scale, q_BTKRH[:, start:end], k_BSKH[:, seen], v_BSKH[:, seen], queries[slice(start, end)], keys[seen]))
    return (outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)).reshape(B, T, Q, H)


def dot_product_attention_reference(
    q_BTQH: Float[Array, "B T Q H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "B T"] | None = None,
    causal: bool,
    scale: float | None = None,
) -> Float[Array, "B T Q H"]:
    """`chunked_attention` by its definition: all scores at once, gradients by differentiation."""
    B, T, Q, H = q_BTQH.shape
    mask_BTS = _Places.of(q_segment_ids, q_index, causal).sees(_Places.of(kv_segment_ids, None, causal))
    mask = mask_BTS[:, None, None]
    q_BTKRH = q_BTQH.reshape(B, T, k_BSKH.shape[2], -1, H)
    scores = jnp.einsum("btkrh,bskh->bkrts", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * (H**-0.5 if scale is None else scale), _MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0).astype(v_BSKH.dtype)
    return jnp.einsum("bkrts,bskh->btkrh", weights, v_BSKH).reshape(B, T, Q, H)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Places:
    """Where queries or keys stand: their segments and, if order matters, their indices (one row where all rows are alike)."""

    segment_BT: Int[Array, "B T"]
    index_BT: Int[Array, "B T"] | None

    @staticmethod
    def of(segment_BT: Array, index_BT: Array | None, ordered: bool) -> _Places:
        if not ordered:
            return _Places(segment_BT, None)
        return _Places(segment_BT, jnp.arange(segment_BT.shape[1])[None] if index_BT is None else index_BT)

    def __getitem__(self, part: slice) -> _Places:
        return jax.tree.map(lambda x: x[:, part], self)

    def sees(self, keys: _Places) -> Bool[Array, "B T S"]:
        mask = (self.segment_BT[:, :, None] == keys.segment_BT[:, None]) & (self.segment_BT[:, :, None] != 0)
        if self.index_BT is not None and keys.index_BT is not None:
            mask &= keys.index_BT[:, None] <= self.index_BT[:, :, None]
        return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q_BTKRH: Array, k_BSKH: Array, v_BSKH: Array, queries: _Places, keys: _Places) -> Array:
    return _forward(scale, q_BTKRH, k_BSKH, v_BSKH, queries, keys)[0]


def _forward(scale: float, q_BTKRH: Array, k_BSKH: Array, v_BSKH: Array, queries: _Places, keys: _Places) -> tuple[Array, tuple]:
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)

    def attend(q_BCKRH: Array, queries: _Places) -> tuple[tuple[Array, Array], tuple[()]]:
        scores = jnp.einsum("bkrch,bksh->bkrcs", jnp.moveaxis(q_BCKRH, 1, 3), k_BKSH, preferred_element_type=jnp.float32)
        scores = jnp.where(queries.sees(keys)[:, None, None], scores * scale, _MASKED)
        # The bound makes the weight of masked keys zero even where nothing else is left.
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _MASKED / 2)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        out = jnp.einsum("bkrcs,bksh->bkrch", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
        log_z = (top + jnp.log(total))[..., 0]
        return (jnp.moveaxis((out / total).astype(q_BCKRH.dtype), 3, 1), jnp.moveaxis(log_z, 3, 1)), ()

    (out_BTKRH, log_z_BTKR), _ = _by_chunks(attend, (q_BTKRH, queries), ())
    out_BTKRH, log_z_BTKR = checkpoint_name(out_BTKRH, OUTPUT), checkpoint_name(log_z_BTKR, OUTPUT)
    return out_BTKRH, (q_BTKRH, k_BSKH, v_BSKH, queries, keys, out_BTKRH, log_z_BTKR)


def _backward(scale: float, saved: tuple, grad_BTKRH: Array) -> tuple[Array | None, ...]:
    q_BTKRH, k_BSKH, v_BSKH, queries, keys, out_BTKRH, log_z_BTKR = saved
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    shift_BTKR = jnp.sum(grad_BTKRH.astype(jnp.float32) * out_BTKRH.astype(jnp.float32), axis=-1)

    def gradients(q_BCKRH: Array, grad_BCKRH: Array, log_z: Array, shift: Array, queries: _Places) -> tuple[Array, tuple[Array, Array]]:
        # Scores stand with keys before queries: then two of the three gradients are products without a transposed left operand.
        q, grad, log_z, shift = (jnp.moveaxis(x, 1, 3) for x in (q_BCKRH, grad_BCKRH, log_z, shift))
        mask = jnp.swapaxes(queries.sees(keys), 1, 2)[:, None, :, None]
        scores = jnp.einsum("bksh,bkrch->bksrc", k_BKSH, q, preferred_element_type=jnp.float32)
        weights = jnp.where(mask, jnp.exp(scores * scale - log_z[:, :, None]), 0)
        grad_weights = jnp.einsum("bksh,bkrch->bksrc", v_BKSH, grad, preferred_element_type=jnp.float32)
        grad_scores = (weights * (grad_weights - shift[:, :, None]) * scale).astype(q.dtype)
        grad_v = jnp.einsum("bksrc,bkrch->bksh", weights.astype(q.dtype), grad, preferred_element_type=jnp.float32)
        grad_k = jnp.einsum("bksrc,bkrch->bksh", grad_scores, q, preferred_element_type=jnp.float32)
        B, K, S, R, C = grad_scores.shape
        scores_by_query = transposed_copy(grad_scores.reshape(B, K, S, R * C)).reshape(B, K, R, C, S)
        grad_q = jnp.einsum("bkrcs,bksh->bkrch", scores_by_query, k_BKSH, preferred_element_type=jnp.float32)
        return jnp.moveaxis(grad_q.astype(q.dtype), 3, 1), (grad_k, grad_v)

    zeros = jnp.zeros_like(k_BKSH, jnp.float32), jnp.zeros_like(v_BKSH, jnp.float32)
    grad_q, sums = _by_chunks(gradients, (q_BTKRH, grad_BTKRH, log_z_BTKR, shift_BTKR, queries), zeros)
    grad_k, grad_v = (jnp.swapaxes(x, 1, 2).astype(k_BSKH.dtype) for x in sums)
    return grad_q, grad_k, grad_v, None, None


_attend.defvjp(_forward, _backward)


def _by_chunks(function: Callable[..., tuple[Any, Any]], arrays: Any, zeros: Any) -> tuple[Any, Any]:
    """Applies `function` to chunks of arrays [B, T, ...]; it returns (chunks of results, terms). Gives the results for all of T,
    and the sums of the terms over the chunks, which start from `zeros`. Padding is in segment 0."""
    T = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-T // _LONGEST_CHUNK)
    if count == 1:
        return function(*arrays)
    chunk = -(-T // count)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * chunk, *x.shape[3:])[:, :T]

    def step(sums: Any, chunks: Any) -> tuple[Any, Any]:
        results, terms = function(*chunks)
        return jax.tree.map(jnp.add, sums, terms), results

    sums, results = jax.lax.scan(step, zeros, jax.tree.map(split, arrays))
    return jax.tree.map(join, results), sums
