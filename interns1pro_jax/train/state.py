"""Everything that changes from step to step, as one pytree of sharded arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.optim.optimizer import Optimizer
from interns1pro_jax.train.faults import STOP_IF_NOT_FINITE, FaultPolicy, empty_history


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a training run; together with the configuration and the data it determines all that follows.

    Attributes:
      step: batches consumed. The next batch is number `step`.
      params: trained parameters.
      buffers: the model's other arrays, frozen parameters among them.
      opt_state: moments and counters of the optimizer; moments have the sharding of their parameters.
      tokens_seen: tokens with a loss so far, as low and high 32 bits (int64 needs a global JAX switch, and float32 stops
        counting at 2**24); see `add_tokens` and `count_tokens`.
      skipped: bad steps, whose update was not applied (`train.faults`).
      history: loss and gradient norm of the last `FaultPolicy.window` good steps, in a ring.
    """

    step: Int[Array, ""]
    params: nnx.State
    buffers: nnx.State
    opt_state: optax.OptState
    tokens_seen: UInt[Array, " words"]
    skipped: Int[Array, ""]
    history: Float[Array, "2 W"]


def init_state(model: nnx.Module, optimizer: Optimizer, faults: FaultPolicy = STOP_IF_NOT_FINITE) -> tuple[nnx.GraphDef, TrainState]:
    """State at step 0, and the static structure that `nnx.merge(graphdef, state.params, state.buffers)` needs.

    Raises:
      ConfigError: see `Optimizer.split`.
    """
    params, buffers = optimizer.split(model)
    return nnx.graphdef(model), TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        tokens_seen=jnp.zeros((2,), jnp.uint32),
        skipped=jnp.zeros((), jnp.int32),
        history=empty_history(faults.window),
    )


def abstract_init(config: ModelConfig, optimizer: Optimizer) -> tuple[nnx.GraphDef, TrainState]:
    """`init_state` of a new model as shapes, dtypes and shardings on the mesh in force: nothing is allocated."""
    graphs = []

    def initial() -> TrainState:
        graphdef, state = init_state(InternS1Pro(config, rngs=nnx.Rngs(0)), optimizer)
        graphs.append(graphdef)
        return state

    state = jax.eval_shape(initial)
    return graphs[0], abstract_state(state)


def add_tokens(tokens_seen: UInt[Array, " words"], tokens: Array) -> UInt[Array, " words"]:
    """Adds a batch's number of tokens (below 2**32) to the 64-bit counter; for use inside jit."""
    low = tokens_seen[0] + tokens.astype(jnp.uint32)
    return jnp.stack([low, tokens_seen[1] + (low < tokens_seen[0])])


def count_tokens(state: TrainState) -> int:
    """The 64-bit counter as a Python integer."""
    low, high = np.asarray(state.tokens_seen)
    return (int(high) << 32) + int(low)


def abstract_state(state: Any) -> Any:
    """Shapes, dtypes and shardings (on the mesh in force) of a state, or of what `jax.eval_shape` makes of one."""
    mesh = jax.sharding.get_mesh()

    def leaf(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(mesh, sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)
