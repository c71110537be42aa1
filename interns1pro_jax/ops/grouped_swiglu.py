"""Gate and up projection of experts with SwiGLU and the rows' weights: one kernel on TPU, a grouped product and XLA elsewhere."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.grouped_matmul import grouped_matmul, pad_to_lanes
from interns1pro_jax.ops.varying import match_varying
from pallas_kernels import grouped_swiglu as tpu
from pallas_kernels.chips import current_chip


def grouped_swiglu(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K two_F"],
    weights_M: Float[Array, " M"],
    group_sizes_G: Int[Array, " G_used"],
    *,
    group_offset: int | Int[Array, ""] | None = None,
) -> Float[Array, "M F"]:
    """`weight * silu(row @ gate) * (row @ up)`, where gate and up are the left and the right half of the matrix of the row's group.
    Differentiable in `lhs_MK`, `rhs_GKN` and `weights_M`; the other arguments are those of `grouped_matmul`."""
    if (chip := current_chip()) is None:
        return tpu.weighted_swiglu(grouped_matmul(lhs_MK, rhs_GKN, group_sizes_G, group_offset=group_offset), weights_M)
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    lhs_MK, rhs_GKN, weights_M, group_sizes_G, offset = match_varying(lhs_MK, rhs_GKN, weights_M, group_sizes_G, offset)
    # Toy models are narrower than the kernels' lanes: see `grouped_matmul`.
    groups, columns = rhs_GKN.shape[0], rhs_GKN.shape[2]
    halves_GK2F = pad_to_lanes(pad_to_lanes(rhs_GKN.astype(lhs_MK.dtype), 1).reshape(groups, -1, 2, columns // 2), 3)
    hidden_MF = tpu.grouped_swiglu(
        pad_to_lanes(lhs_MK, 1),
        halves_GK2F.reshape(*halves_GK2F.shape[:2], -1),
        weights_M,
        group_sizes_G,
        group_offset=offset,
        chip=chip,
    )
    return hidden_MF[:, : columns // 2]
