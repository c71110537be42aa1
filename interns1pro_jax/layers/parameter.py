"""How modules declare their parameters: shape, logical dimensions and initial value in one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from interns1pro_jax import sharding


class Initializer(Protocol):
    """Makes an initial value where it will live: without `out_sharding` every device would make all of it first."""

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, /, *, out_sharding: PartitionSpec) -> jax.Array: ...


class Buffer(nnx.Variable):
    """An array that belongs to the checkpoint but is never trained (the Fourier coefficients)."""


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def parameter(
    rngs: nnx.Rngs,
    initializer: Initializer,
    shape: Sequence[int],
    dims: Sequence[str | None],
    dtype: str | jnp.dtype,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """A parameter of this shape, split over the mesh in force by its logical dimensions.

    Args:
      dims: one logical dimension (see `sharding.RULES`) or None for each axis of `shape`.
      kind: `nnx.Param` (trained) or `Buffer` (not).

    Raises:
      ConfigError: a dimension does not divide over the mesh in force.
    """
    sharding.check_divisible("parameter", shape, dims)
    spec = sharding.spec(*dims)
    return kind(initializer(rngs.params(), tuple(shape), jnp.dtype(dtype), out_sharding=spec), out_sharding=spec)


def gathered(w: nnx.Variable, dtype: jnp.dtype) -> jax.Array:
    """The whole parameter on every device, in the compute dtype; its gradient returns to the parameter's own sharding."""
    return jax.sharding.reshard(w[...].astype(dtype), PartitionSpec())
