"""Products of activations with weights that are split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from interns1pro_jax import sharding
from interns1pro_jax.ops.float32_product import float32_product
from interns1pro_jax.ops.varying import as_varying


def gather_weight(weight: Array, spec: PartitionSpec, dtype: jax.typing.DTypeLike, axes: frozenset[str]) -> Array:
    """Inside `shard_map`: the whole of a weight of which each device holds the part that `spec` says, in `dtype`, to be used with what
    varies over `axes`. Its gradient is summed and split again over the same axes.

    The axes are gathered one by one: over all three dimensions of a TPU's torus at once XLA has no all-gather but adds up arrays of
    zeros, which moves twice the bytes.
    """
    weight = as_varying(weight.astype(dtype), axes)
    with jax.named_scope("weight_all_gather"):
        for dim, split in enumerate(spec):
            for axis in reversed((split,) if isinstance(split, str) else split or ()):
                weight = jax.lax.all_gather(weight, axis, axis=dim, tiled=True)
    return weight


def gathered(name: str, weight: Float[Array, "*shape"], dtype: jax.typing.DTypeLike) -> Float[Array, "R ..."]:
    """Every device's own copy of a weight that is split in any way, in `dtype`, for `project` to use any number of times. The gradients of
    all uses are added on the device and split again once."""
    spec = jax.typeof(weight).sharding.spec

    def local(weight: Array) -> Array:
        with jax.named_scope(name):
            return gather_weight(weight, spec, dtype, frozenset(sharding.token_axes()))[None]

    return jax.shard_map(local, in_specs=spec, out_specs=PartitionSpec(sharding.token_axes(), *(None,) * weight.ndim))(weight)


def project(
    formula: str, x_BT: Float[Array, "B T *features"], copies: Float[Array, "R ..."], float32: bool = False
) -> Float[Array, "B T *results"]:
    """`jnp.einsum(formula, x_BT, weight)` in the dtype of `x_BT`, or exactly in `float32`, split over batch and sequence; the weight is
    `gathered`."""
    x_BT = sharding.constrain(x_BT, "batch", "sequence", *(None,) * (x_BT.ndim - 2))
    x_spec = jax.typeof(x_BT).sharding.spec
    rank = len(formula.partition("->")[2])

    def local(x: Array, copies: Array) -> Array:
        with jax.named_scope(formula):
            return (float32_product if float32 else jnp.einsum)(formula, x, copies[0])

    specs = (x_spec, PartitionSpec(sharding.token_axes(), *(None,) * (copies.ndim - 1)))
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(*x_spec[:2], *(None,) * (rank - 2)))(x_BT, copies)
