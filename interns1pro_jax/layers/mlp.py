"""The dense SwiGLU feed-forward layer (spec 2.5, layers of `mlp_only_layers`; none in the release)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.parameter import normal, parameter
from interns1pro_jax.ops.projection import gathered, project


def swiglu(gate_up: Float[Array, "... two_F"]) -> Float[Array, "... F"]:
    """`silu(gate) * up` of a fused projection: the first half is the gate, the second the up projection."""
    gate, up = jnp.split(gate_up, 2, -1)
    return jax.nn.silu(gate) * up


class Mlp(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        init = normal(config.initializer_range)
        self.wi_DF = parameter(rngs, init, (d, 2 * f), ("embed", None), config.param_dtype)
        self.wo_FD = parameter(rngs, init, (f, d), (None, "embed"), config.param_dtype)

    def __call__(self, streams: tuple[Float[Array, "_ T D"], ...]) -> tuple[Float[Array, "_ T D"], ...]:
        wi, wo = (gathered("mlp", weight[...], streams[0].dtype) for weight in (self.wi_DF, self.wo_FD))
        return tuple(project("btf,fd->btd", swiglu(project("btd,df->btf", x_BTD, wi)), wo) for x_BTD in streams)
