"""Scaled dot-product attention with grouped query heads, document segments and bounded memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dot_product_attention_reference(
    q_BTQH: Float[Array, "B T Q H"], k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"],
    *, q_segment_ids: Int[Array, "B T"], kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "B T"] | None = None, kv_index: Int[Array, "B S"] | None = None,
    causal: bool, scale: float | None = None,
) -> Float[Array, "B T Q H"]:  # fmt: skip
    """`dot_product_attention` in one piece, with the whole [B, K, Q/K, T, S] score array."""
    B, T, Q, H = q_BTQH.shape
    S, K = k_BSKH.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    mask_BTS = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (q_segment_ids[:, :, None] != 0)
    if causal:
        q_index = jnp.arange(T)[None] if q_index is None else q_index
        kv_index = jnp.arange(S)[None] if kv_index is None else kv_index
        mask_BTS &= kv_index[:, None, :] <= q_index[:, :, None]
    q_BTKRH = q_BTQH.reshape(B, T, K, Q // K, H)
    scores = jnp.einsum("btkrh,bskh->bkrts", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32) * scale
    mask = mask_BTS[:, None, None]
    # A finite minimum, and zeroed weights, keep rows without any key at zero and their gradients finite.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0).astype(v_BSKH.dtype)
    return jnp.einsum("bkrts,bskh->btkrh", weights, v_BSKH).reshape(B, T, Q, H)


def dot_product_attention(
    q_BTQH: Float[Array, "B T Q H"], k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"],
    *, q_segment_ids: Int[Array, "B T"], kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "B T"] | None = None, kv_index: Int[Array, "B S"] | None = None,
    causal: bool, scale: float | None = None,
) -> Float[Array, "B T Q H"]:  # fmt: skip
    """Attention of T queries over S keys; query head i reads key/value head i // (Q/K).

    Args:
      q_segment_ids, kv_segment_ids: a query sees keys of its own segment; 0 is padding, which sees and is seen by nothing.
      q_index, kv_index: where queries and keys stand in the row; default 0, 1, .... Only read if `causal`.
      causal: a query sees keys with `kv_index <= q_index` only.
      scale: factor on the scores; default H**-0.5.

    Returns:
      Weighted values; zero for a query that sees no key.
    """
    return dot_product_attention_reference(
        q_BTQH, k_BSKH, v_BSKH, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
        q_index=q_index, kv_index=kv_index, causal=causal, scale=scale,
    )  # fmt: skip
