"""Low-rank adapters (arXiv:2106.09685) of attention and experts: all that such a run trains; merged where its weights are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from interns1pro_jax.config import LoraConfig, ModelConfig, TextConfig
from interns1pro_jax.layers.parameter import normal, parameter, zeros
from interns1pro_jax.ops.projection import gathered, project


class Adapter(nnx.Variable):
    """A parameter of an adapter; kept in float32."""


def trained_kind(config: ModelConfig) -> type[nnx.Variable]:
    """The variables that a run of this model trains: adapters where it has any."""
    return nnx.Param if config.text.lora is None else Adapter


class Projection(nnx.Module):
    """The adapter of one attention projection: `scale * (x A) B`; B begins as zeros, so that nothing changes at first."""

    def __init__(self, lora: LoraConfig, into: tuple[int, ...], out: tuple[int, ...], dims: dict[str, tuple], *, rngs: nnx.Rngs):
        fan_in = 1
        for size in into:
            fan_in *= size
        self.scale = lora.scale
        self.a = parameter(rngs, normal(fan_in**-0.5), (*into, lora.rank), (*dims["into"], None), "float32", Adapter)
        self.b = parameter(rngs, zeros, (lora.rank, *out), (None, *dims["out"]), "float32", Adapter)

    def __call__(self, x_BT: Float[Array, "B T *features"]) -> Float[Array, "B T *results"]:
        into, out = "xyz"[: self.a.ndim - 1], "uvw"[: self.b.ndim - 1]
        a, b = (gathered("adapter", weight[...], x_BT.dtype) for weight in (self.a, self.b))
        low_BTR = project(f"bt{into},{into}r->btr", x_BT, a)
        return self.scale * project(f"btr,r{out}->bt{out}", low_BTR, b)


class AttentionAdapters(nnx.Module):
    def __init__(self, config: TextConfig, lora: LoraConfig, *, rngs: nnx.Rngs):
        d, q, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        from_width = {"into": ("embed",), "out": (None, None)}
        self.q, self.k, self.v = (Projection(lora, (d,), (heads, h), from_width, rngs=rngs) for heads in (q, k, k))
        self.o = Projection(lora, (q, h), (d,), {"into": (None, None), "out": ("embed",)}, rngs=rngs)


class ExpertAdapters(nnx.Module):
    def __init__(self, config: TextConfig, lora: LoraConfig, *, rngs: nnx.Rngs):
        e, d, f, r = config.num_experts, config.hidden_size, config.moe_intermediate_size, lora.rank
        into, out = ("expert", "expert_embed", None), ("expert", None, "expert_embed")
        self.scale = lora.scale
        self.wi_a_EDR = parameter(rngs, normal(d**-0.5), (e, d, r), into, "float32", Adapter)
        self.wi_b_ERF = parameter(rngs, zeros, (e, r, 2 * f), ("expert", None, None), "float32", Adapter)
        self.wo_a_EFR = parameter(rngs, normal(f**-0.5), (e, f, r), ("expert", None, None), "float32", Adapter)
        self.wo_b_ERD = parameter(rngs, zeros, (e, r, d), out, "float32", Adapter)

    def arrays(self) -> tuple[Array, ...]:
        return self.wi_a_EDR[...], self.wi_b_ERF[...], self.wo_a_EFR[...], self.wo_b_ERD[...]


def merged(config: ModelConfig, params: nnx.State, adapters: nnx.State) -> tuple[ModelConfig, nnx.State]:
    """The configuration and parameters of the model without adapters that computes the same; sharded as the parameters are."""
    assert config.text.lora is not None
    scale = config.text.lora.scale
    plain = dataclasses.replace(config, text=dataclasses.replace(config.text, lora=None))

    @jax.jit
    def add(params: nnx.State, adapters: nnx.State) -> nnx.State:
        flat: dict[tuple[Any, ...], nnx.Variable] = dict(nnx.to_flat_state(params))
        pairs: dict[tuple[Any, ...], jax.Array] = {path: x[...] for path, x in nnx.to_flat_state(adapters)}
        for path, a in pairs.items():
            *layer, name = path
            if name == "a":  # text/runs/0/attention/lora/q/a belongs to text/runs/0/attention/q_DQH
                *block, _, which = layer
                b = pairs[(*layer, "b")]
                (target,) = (p for p in flat if p[:-1] == tuple(block) and p[-1].startswith(f"{which}_") and p[-1][2].isupper())
                change = jnp.einsum("ldr,lrnh->ldnh" if a.ndim == 3 else "lqhr,lrd->lqhd", a, b)
            elif "_a_" in str(name):  # text/runs/0/moe/lora/wi_a_EDR belongs to text/runs/0/moe/wi_EDF
                which = str(name)[:2]
                (other,) = (p for p in pairs if p[:-1] == path[:-1] and str(p[-1]).startswith(f"{which}_b_"))
                (target,) = (p for p in flat if p[:-1] == tuple(layer[:-1]) and str(p[-1]).startswith(f"{which}_"))
                change = jnp.einsum("lexr,lery->lexy", a, pairs[other])
            else:
                continue
            old = flat[target][...]
            change = jax.sharding.reshard(change, jax.typeof(old).sharding.spec)
            flat[target] = flat[target].replace((old.astype(jnp.float32) + scale * change).astype(old.dtype))
        return nnx.from_flat_state(flat)

    return plain, add(params, adapters)
