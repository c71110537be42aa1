"""RMS norm of each head and rotary encoding of queries and keys: one kernel on TPU, `ops.norm` and `ops.fope` elsewhere."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from interns1pro_jax.ops.fope import apply_rotary
from interns1pro_jax.ops.norm import rms_norm
from interns1pro_jax.ops.varying import match_varying
from pallas_kernels import rotary as tpu
from pallas_kernels.chips import current_chip


def norm_and_rotary(
    q_BTQH: Float[Array, "B T Q H"],
    k_BTKH: Float[Array, "B T K H"],
    q_norm_H: Float[Array, " H"],
    k_norm_H: Float[Array, " H"],
    cos: Float[Array, "B heads T H"],
    sin: Float[Array, "B heads T H"],
    eps: float,
) -> tuple[Float[Array, "B T Q H"], Float[Array, "B T K H"]]:
    """Queries and keys, each head divided by its root mean square and turned by the tables' angles (spec 2.2, 2.3), in their own dtype.
    Heads share the rows of the tables as in `apply_rotary`. Differentiable in all but the tables, which no model trains.

    Arrays may be split along B and T. On TPU heads of 128 in rows of a multiple of 128 tokens go through the kernel
    (`pallas_kernels.rotary`), whose queries and keys lie with heads before tokens: XLA lets the products on both sides of it write and
    read that layout. It rounds once, the plain form after every step.
    """
    cos, sin = jax.lax.stop_gradient((cos, sin))
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_local, eps)
    if mesh.empty or mesh.are_all_axes_manual:
        return local(q_BTQH, k_BTKH, q_norm_H, k_norm_H, cos, sin)
    heads = PartitionSpec(*jax.typeof(q_BTQH).sharding.spec[:2], None, None)
    tables = PartitionSpec(heads[0], None, heads[1], None)
    copied = PartitionSpec(None)
    q_BTQH, k_BTKH, cos, sin = jax.sharding.reshard((q_BTQH, k_BTKH, cos, sin), (heads, heads, tables, tables))
    # Kernels are not partitioned.
    sharded = jax.shard_map(local, in_specs=(heads, heads, copied, copied, tables, tables), out_specs=(heads, heads))
    return sharded(q_BTQH, k_BTKH, q_norm_H, k_norm_H, cos, sin)


def norm_and_rotary_reference(
    q_BTQH: Float[Array, "B T Q H"],
    k_BTKH: Float[Array, "B T K H"],
    q_norm_H: Float[Array, " H"],
    k_norm_H: Float[Array, " H"],
    cos: Float[Array, "B heads T H"],
    sin: Float[Array, "B heads T H"],
    eps: float,
) -> tuple[Float[Array, "B T Q H"], Float[Array, "B T K H"]]:
    """`norm_and_rotary` of one device's arrays in plain JAX."""
    cos, sin = (jnp.swapaxes(table, 1, 2) for table in (cos, sin))
    return apply_rotary(rms_norm(q_BTQH, q_norm_H, eps), cos, sin), apply_rotary(rms_norm(k_BTKH, k_norm_H, eps), cos, sin)


def _local(eps: float, q_BTQH: Array, k_BTKH: Array, q_norm_H: Array, k_norm_H: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """A device's share, by the kernel where it can be."""
    T, Q, H = q_BTQH.shape[1:]
    if not (current_chip() and tpu.takes(T, Q // k_BTKH.shape[2], H)):
        return norm_and_rotary_reference(q_BTQH, k_BTKH, q_norm_H, k_norm_H, cos, sin, eps)
    q_BQTH, k_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTQH, k_BTKH))
    q_BQTH, k_BKTH = tpu.norm_and_rotary(*match_varying(q_BQTH, k_BKTH, q_norm_H, k_norm_H, cos, sin), eps=eps)
    return jnp.swapaxes(q_BQTH, 1, 2), jnp.swapaxes(k_BKTH, 1, 2)
