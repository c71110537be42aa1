"""Products of rows with the matrix of their group: the expert layers.

`grouped_matmul` is the one entry. Its cost is that of its FLOPs: on CPU a loop over blocks of rows, elsewhere
`jax.lax.ragged_dot`. `grouped_matmul_reference` is the dense oracle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    lhs_MK: Float[Array, "M K"], rhs_GKN: Float[Array, "G K N"], group_sizes_G: Int[Array, " G"],
    *, group_offset: int | Int[Array, ""] | None = None, preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "M N"]:  # fmt: skip
    """The product by its definition: every group's matrix on every row, of which one is kept."""
    ends = jnp.cumsum(group_sizes_G)
    group_M = jnp.searchsorted(ends, jnp.arange(lhs_MK.shape[0]), side="right")
    mine_MG = group_M[:, None] == jnp.arange(group_sizes_G.size)
    offset = 0 if group_offset is None else group_offset
    used_GKN = jax.lax.dynamic_slice_in_dim(rhs_GKN, offset, group_sizes_G.size)
    products_GMN = jnp.einsum("mk,gkn->gmn", lhs_MK, used_GKN, preferred_element_type=preferred_element_type)
    return jnp.einsum("gmn,mg->mn", products_GMN, mine_MG.astype(products_GMN.dtype))


def grouped_matmul(
    lhs_MK: Float[Array, "M K"], rhs_GKN: Float[Array, "G K N"], group_sizes_G: Int[Array, " G"],
    *, group_offset: int | Int[Array, ""] | None = None, preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "M N"]:  # fmt: skip
    return grouped_matmul_reference(
        lhs_MK, rhs_GKN, group_sizes_G, group_offset=group_offset, preferred_element_type=preferred_element_type
    )
