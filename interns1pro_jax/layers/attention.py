"""Grouped-query attention with per-head q/k norm and rotary tables, and its static key/value cache (spec 2.2, 2.6)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.lora import AttentionAdapters
from interns1pro_jax.layers.parameter import normal, ones, parameter, zeros
from interns1pro_jax.ops import projection
from interns1pro_jax.ops.attention import OPERANDS, dot_product_attention
from interns1pro_jax.ops.rotary import norm_and_rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What every attention layer of a forward pass shares.

    Attributes:
      cos, sin: rotary tables of the tokens in the compute dtype, laid out for `ops.rotary`; no gradient goes to them.
      segment_ids: document of each token, 0 for padding.
      kv_segment_ids: document of each key of the whole row, in reading order (tokens may be in the order of `ops.context`); with a
        cache, of each of its slots, *after* the tokens of this pass have been written.
      slot: first cache slot of this pass; every row writes at the same slots, so that a write is one slice.
    """

    cos: Float[Array, "B heads T H"]
    sin: Float[Array, "B heads T H"]
    segment_ids: Int[Array, "B T"]
    kv_segment_ids: Int[Array, "B S"]
    slot: Int[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (after norm and rotary) and values of a run of layers, and the layer of the run to use."""

    keys_LBSKH: Float[Array, "L B S K H"]
    values_LBSKH: Float[Array, "L B S K H"]
    layer: Int[Array, ""]


class Attention(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, q, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        dtype, init = config.param_dtype, normal(config.initializer_range)
        self.q_DQH = parameter(rngs, init, (d, q, h), ("embed", None, None), dtype)
        self.k_DKH = parameter(rngs, init, (d, k, h), ("embed", None, None), dtype)
        self.v_DKH = parameter(rngs, init, (d, k, h), ("embed", None, None), dtype)
        self.o_QHD = parameter(rngs, init, (q, h, d), (None, None, "embed"), dtype)
        if config.attention_bias:
            self.q_bias_QH = parameter(rngs, zeros, (q, h), (None, None), dtype)
            self.k_bias_KH = parameter(rngs, zeros, (k, h), (None, None), dtype)
            self.v_bias_KH = parameter(rngs, zeros, (k, h), (None, None), dtype)
            self.o_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.q_norm_H = parameter(rngs, ones, (h,), (None,), dtype)
        self.k_norm_H = parameter(rngs, ones, (h,), (None,), dtype)
        lora = config.lora
        self.lora = None if lora is None or not lora.attention else AttentionAdapters(config, lora, rngs=rngs)

    def gathered(self, dtype: jax.typing.DTypeLike) -> dict[str, Float[Array, "R ..."]]:
        """Every device's copies of the matrices."""
        matrices = {"q": self.q_DQH, "k": self.k_DKH, "v": self.v_DKH, "o": self.o_QHD}
        return {name: projection.gathered(name, matrix[...], dtype) for name, matrix in matrices.items()}

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: AttentionContext,
        weights: dict[str, Float[Array, "R ..."]],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Causal attention within documents; with a cache, over its slots (which this pass's keys and values join first). `weights` are
        `gathered`; several calls may share them."""
        cfg, dtype = self.config, x_BTD.dtype

        def changed(name: str, y_BT: jax.Array, x_BT: jax.Array, bias: str) -> jax.Array:
            y_BT = y_BT if self.lora is None else y_BT + getattr(self.lora, name)(x_BT)
            return y_BT + getattr(self, bias)[...].astype(dtype) if cfg.attention_bias else y_BT

        biases = {"q": "q_bias_QH", "k": "k_bias_KH", "v": "v_bias_KH"}
        q, k, v = (changed(n, projection.project("btd,dnh->btnh", x_BTD, weights[n]), x_BTD, bias) for n, bias in biases.items())
        q, k = norm_and_rotary(q, k, self.q_norm_H[...], self.k_norm_H[...], context.cos, context.sin, cfg.rms_norm_eps)
        # A reshape does not always show where its result lives: not with one token or one row.
        q, k, v = (sharding.constrain(a, "batch", "sequence", None, None) for a in (q, k, v))
        q, k, v = (checkpoint_name(a, name) for a, name in zip((q, k, v), OPERANDS, strict=True))
        if cache is None:
            out = dot_product_attention(q, k, v, q_segment_ids=context.segment_ids, kv_segment_ids=context.kv_segment_ids, causal=True)
        else:
            assert context.slot is not None
            q, k, v = (sharding.constrain(a, "batch", None, None, None) for a in (q, k, v))  # a cache has whole rows
            start = (cache.layer, 0, context.slot, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache.keys_LBSKH, k[None].astype(cache.keys_LBSKH.dtype), start)
            values = jax.lax.dynamic_update_slice(cache.values_LBSKH, v[None].astype(cache.values_LBSKH.dtype), start)
            cache = LayerCache(keys, values, cache.layer)
            out = dot_product_attention(
                q,
                jax.lax.dynamic_index_in_dim(keys, cache.layer, keepdims=False).astype(dtype),
                jax.lax.dynamic_index_in_dim(values, cache.layer, keepdims=False).astype(dtype),
                q_segment_ids=context.segment_ids,
                kv_segment_ids=context.kv_segment_ids,
                q_index=jnp.broadcast_to(context.slot + jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2]),
                causal=True,
            )
            out = sharding.constrain(out, "batch", "sequence", None, None)
        # One product over all heads: head by head it would fill half of a matrix unit that is deeper than a head.
        flat, matrices = out.reshape(*out.shape[:2], -1), weights["o"].reshape(len(weights["o"]), -1, x_BTD.shape[-1])
        return changed("o", projection.project("btf,fd->btd", flat, matrices), out, "o_bias_D"), cache
