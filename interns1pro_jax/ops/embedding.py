"""Rows of a table whose width is split over devices, for tokens that are split over the same devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.ops.projection import gather_weight
from interns1pro_jax.ops.varying import match_varying, varying_axes


def embed(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: jax.typing.DTypeLike) -> Float[Array, "B T D"]:
    """`table_VD[tokens_BT]` in `dtype`, split over batch and sequence.

    Few tokens (decoding, small batches) every device looks up for all, in its part of the width, and the results are exchanged. A batch
    of more tokens than the table has rows would make every device look up all of it: then the table is gathered, and each device looks
    up its own tokens.

    Raises:
      ConfigError: batch or sequence does not divide over the mesh.
    """
    sharding.check_divisible("tokens", tokens_BT.shape, ("batch", "sequence"))
    if tokens_BT.size <= table_VD.shape[0]:
        ids = sharding.constrain(tokens_BT, "replica", "sequence")
        x_BTD = table_VD.at[ids].get(out_sharding=sharding.spec("replica", "sequence", "embed"))
        return sharding.constrain(x_BTD.astype(dtype), "batch", "sequence", None)
    table_spec, tokens_spec = jax.typeof(table_VD).sharding.spec, sharding.spec("batch", "sequence")

    def local(table_VD: Array, tokens_BT: Array) -> Array:
        with jax.named_scope("embedding"):
            table_VD = gather_weight(table_VD, table_spec, dtype, varying_axes(tokens_BT))
        return _rows(len(table_VD), *match_varying(table_VD, tokens_BT))

    specs = (table_spec, tokens_spec)
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(*tokens_spec, None))(
        table_VD, sharding.constrain(tokens_BT, "batch", "sequence")
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(vocabulary: int, table_VD: Array, tokens_BT: Array) -> Array:
    return table_VD.at[tokens_BT].get()


def _backward(vocabulary: int, tokens_BT: Array, grad_BTD: Array) -> tuple[Array, None]:
    # Added up in float32, whatever the table's dtype: frequent tokens have many rows.
    zeros = jnp.zeros((vocabulary, grad_BTD.shape[-1]), jnp.float32)
    zeros, tokens_BT, grad_BTD = match_varying(zeros, tokens_BT, grad_BTD)
    return zeros.at[tokens_BT].add(grad_BTD.astype(jnp.float32)).astype(grad_BTD.dtype), None


_rows.defvjp(lambda vocabulary, table_VD, tokens_BT: (_rows(vocabulary, table_VD, tokens_BT), tokens_BT), _backward)
