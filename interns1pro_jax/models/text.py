"""The text decoder: embedding, runs of decoder blocks, final norm, output head (spec 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.attention import AttentionContext
from interns1pro_jax.layers.decoder import BlockOutput, LayerInputs, run_blocks, run_blocks_cached, stack_blocks
from interns1pro_jax.layers.parameter import Buffer, normal, ones, parameter
from interns1pro_jax.layers.router import NOT_RECORDED, RouterStats
from interns1pro_jax.ops.context import balance, reading_order
from interns1pro_jax.ops.embedding import embed
from interns1pro_jax.ops.fope import initial_coefficients, rotary_tables, text_frequencies
from interns1pro_jax.ops.norm import rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A static key/value cache: one pair of arrays for each run of layers.

    Attributes:
      keys, values: [layers of the run, B, S, K, H] each.
      segment_ids: document of each slot; 0 where the slot is empty or padding.
      length: slots in use, the same for all rows. Rows of different lengths differ in `segment_ids` and positions only, so
        that a write is one slice.
    """

    keys: tuple[Float[Array, "L B S K H"], ...]
    values: tuple[Float[Array, "L B S K H"], ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    @staticmethod
    def empty(config: TextConfig, batch: int, slots: int, dtype: str | jnp.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `slots` tokens, split over the mesh in force along the batch."""
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        dtype = jnp.dtype(dtype or config.dtype)

        def zeros() -> tuple[jax.Array, ...]:
            spec = sharding.spec(None, "batch", None, None, None)
            return tuple(jnp.zeros((count, *shape), dtype, out_sharding=spec) for _, _, count in config.layer_runs)

        segments = jnp.zeros((batch, slots), jnp.int32, out_sharding=sharding.spec("batch", None))
        return KVCache(zeros(), zeros(), segments, jnp.int32(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutput:
    """Result of the decoder.

    Attributes:
      hidden_BTD: output of the final norm; `TextModel.logits` turns it into logits.
      routing_LBTGC: in-group expert ids of every MoE layer, uint8 or wider as groups need; feed it back as `replay`.
      stats: router statistics of every MoE layer and row, with leading axes L and B; None in a model without experts.
      cache: the cache after this pass.
      trace: per run of layers, the intermediate values; None unless asked for.
    """

    hidden_BTD: Float[Array, "B T D"]
    routing_LBTGC: Int[Array, "L B T G C"] | None
    stats: RouterStats | None
    cache: KVCache | None = None
    trace: tuple[BlockOutput, ...] | None = None


class Fope(nnx.Module):
    """The Fourier coefficients: one pair for all layers, part of the checkpoint, never trained (spec 2.3)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        assert config.fope is not None
        n = len(text_frequencies(config))
        shape = (config.num_key_value_heads, n, n) if config.fope.sep_head else (n, n)
        gain = config.fope.init_factor

        def initial(key, shape, dtype, *, out_sharding):
            return jax.sharding.reshard(initial_coefficients(key, shape, gain).astype(dtype), out_sharding)

        self.sin_coef = parameter(rngs, initial, shape, (None,) * len(shape), config.param_dtype, Buffer)
        self.cos_coef = parameter(rngs, initial, shape, (None,) * len(shape), config.param_dtype, Buffer)


class TextModel(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        init, dtype = normal(config.initializer_range), config.param_dtype
        self.embed_VD = parameter(rngs, init, (config.vocab_size, config.hidden_size), (None, "embed"), dtype)
        self.runs = nnx.List([stack_blocks(config, moe, count, rngs=rngs) for moe, _, count in config.layer_runs])
        self.final_norm_D = parameter(rngs, ones, (config.hidden_size,), (None,), dtype)
        if not config.tie_word_embeddings:
            self.lm_head_DV = parameter(rngs, init, (config.hidden_size, config.vocab_size), ("embed", None), dtype)
        self.fope = None if config.fope is None else Fope(config, rngs=rngs)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the compute dtype."""
        return embed(self.embed_VD[...], tokens_BT, self.config.dtype)

    def rotary(self, positions_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T heads H"], Float[Array, "B T heads H"]]:
        """cos and sin tables in float32 for these positions."""
        coefs = () if self.fope is None else (self.fope.sin_coef[...], self.fope.cos_coef[...])
        return rotary_tables(positions_BT, text_frequencies(self.config), self.config.head_dim, *coefs)

    @property
    def head_DV(self) -> Float[Array, "D V"]:
        """The output head: its own matrix, or the embedding where the config ties the two."""
        return self.embed_VD[...].T if self.config.tie_word_embeddings else self.lm_head_DV[...]

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in the compute dtype (the loss uses `ops.losses.cross_entropy`, which never holds all of them)."""
        return jnp.einsum("btd,dv->btv", hidden_BTD, self.head_DV.astype(hidden_BTD.dtype))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        replay_LBTGC: Int[Array, "L B T G C"] | None = None,
        probe_LR: Float[Array, "L R"] | None = None,
        remat: str = "none",
        moe_chunks: int = 1,
        trace: bool = False,
    ) -> TextOutput:
        """Runs the decoder on embeddings. Rows are in reading order, before and after; inside, devices that share a row hold it in the
        order of `ops.context`.

        Args:
          positions_BT: position of each token in its document.
          segment_ids_BT: document of each token, 0 for padding.
          cache: keys and values of earlier tokens; this pass's tokens are appended. If they no longer fit, the output is NaN.
          replay_LBTGC: recorded routing of every MoE layer.
          probe_LR: `layers.router.probes`; their gradient is the squared straight-through gradient outside the chosen experts of
            each MoE layer, for the tokens of each device.
          remat: what the backward keeps of a block (`layers.decoder.REMAT`).
          moe_chunks: parts in which a device's tokens go through the experts (`layers.moe.expert_parallel_mlp`).
          trace: also return the intermediate values of every block.
        """
        kv_segment_ids = sharding.constrain(segment_ids_BT, "batch", None)
        positions_BT, segment_ids_BT = (sharding.constrain(a, "batch", "sequence") for a in (positions_BT, segment_ids_BT))
        if replay_LBTGC is not None:
            replay_LBTGC = sharding.constrain(replay_LBTGC, None, "batch", "sequence", None, None)
        slot = None
        if cache is None:
            x_BTD, positions_BT, segment_ids_BT = (balance(a) for a in (x_BTD, positions_BT, segment_ids_BT))
            replay_LBTGC = None if replay_LBTGC is None else balance(replay_LBTGC, 2)
        else:
            if x_BTD.shape[1] > cache.segment_ids.shape[1]:
                raise ValueError(
                    f"{x_BTD.shape[1]} tokens do not fit in a cache of {cache.segment_ids.shape[1]} slots; make it with "
                    "KVCache.empty(config, batch, slots) for all tokens to come."
                )
            slot = cache.length
            kv_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, kv_segment_ids.astype(jnp.int32), (0, slot))
        # Once for all layers, in the layout and the dtype in which they are used.
        cos, sin = (jnp.swapaxes(table, 1, 2).astype(x_BTD.dtype) for table in self.rotary(positions_BT))
        context = AttentionContext(cos, sin, segment_ids_BT, kv_segment_ids, slot)
        outputs: list[BlockOutput] = []
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        moe_layers = 0
        for index, (moe, _, count) in enumerate(self.config.layer_runs):
            inputs = LayerInputs()
            if moe:
                picked = slice(moe_layers, moe_layers + count)
                inputs = LayerInputs(*(None if x is None else x[picked] for x in (replay_LBTGC, probe_LR)))
                moe_layers += count
            if cache is None:
                x_BTD, out = run_blocks(self.runs[index], x_BTD, context, inputs, remat=remat, moe_chunks=moe_chunks, trace=trace)
            else:
                x_BTD, (k, v), out = run_blocks_cached(
                    self.runs[index], x_BTD, context, inputs, cache.keys[index], cache.values[index], trace=trace
                )
                keys.append(k)
                values.append(v)
            outputs.append(out)
        hidden = rms_norm(x_BTD, self.final_norm_D[...], self.config.rms_norm_eps)
        if cache is None:
            hidden = reading_order(hidden)
            outputs = [o.in_reading_order() for o in outputs]
        else:
            length = cache.length + x_BTD.shape[1]
            # A write beyond the last slot would be moved back over older tokens; a compiled program can only make that visible.
            hidden = jnp.where(length <= kv_segment_ids.shape[1], hidden, jnp.nan)
            cache = KVCache(tuple(keys), tuple(values), kv_segment_ids, length)
        id_dtype = jnp.uint8 if self.config.num_moe_layers == 0 or self.config.experts_per_group <= NOT_RECORDED else jnp.uint16
        return TextOutput(
            hidden_BTD=hidden,
            routing_LBTGC=_concatenate([o.ids_BTGC.astype(id_dtype) for o in outputs if o.ids_BTGC is not None]),
            stats=_concatenate([o.stats for o in outputs if o.stats is not None]),
            cache=cache,
            trace=tuple(outputs) if trace else None,
        )


def _concatenate(parts: Sequence):
    """Joins the layers of several runs; None if there are none."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
