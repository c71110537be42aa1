"""Grouped products as batches of equal blocks of rows, for GPUs: `jax.lax.ragged_dot` there multiplies all rows with all matrices and keeps
the rows once for each.

A group is cut into blocks of `BLOCK` rows, the last of them filled up with zeros. There are at most M / BLOCK + G blocks, whatever the
sizes, so shapes and trip counts are static. A few blocks at a time are one batched product, each with the matrix of its group.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.varying import as_varying, varying_axes

BLOCK = 128  # rows: a tile of the matrix units
_TOGETHER = 64  # blocks of one product: 1.6 GB of matrices at the released sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Blocks:
    """S steps of b blocks of r rows.

    Attributes:
      row_Sbr: row of each place; M where there is none.
      group_Sb: group of each block.
      place_M: place of each row, counted through.
    """

    row_Sbr: Int[Array, "S b r"]
    group_Sb: Int[Array, "S b"]
    place_M: Int[Array, " M"]


def _cut(num_rows: int, sizes_G: Int[Array, " G"]) -> _Blocks:
    groups = sizes_G.size
    most = num_rows // BLOCK + groups
    together = min(_TOGETHER, most)
    steps = -(-most // together)
    end_G, blocks_G = jnp.cumsum(sizes_G), -(-sizes_G // BLOCK)
    start_G, blocks_end_G = end_G - sizes_G, jnp.cumsum(blocks_G)
    first_G = blocks_end_G - blocks_G
    block = jnp.arange(steps * together)
    group = jnp.minimum(jnp.searchsorted(blocks_end_G, block, side="right"), groups - 1)
    row = (start_G[group] + (block - first_G[group]) * BLOCK)[:, None] + jnp.arange(BLOCK)
    row = jnp.where(row < end_G[group][:, None], row, num_rows)
    index_M = jnp.arange(num_rows)
    own_M = jnp.minimum(jnp.searchsorted(end_G, index_M, side="right"), groups - 1)
    place_M = first_G[own_M] * BLOCK + index_M - start_G[own_M]
    return _Blocks(row.reshape(steps, together, BLOCK), group.reshape(steps, together), place_M)


def _taken(x_MK: Array, row: Array) -> Array:
    return x_MK.at[row].get(mode="fill", fill_value=0)


def blocked_product(
    lhs_MK: Float[Array, "M K"],
    rhs: Float[Array, "G_all rows columns"],
    sizes_G: Int[Array, " G"],
    offset: Int[Array, ""],
    *,
    transposed: bool,
    dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """Rows times the [K, N] matrix of their group, or times the transpose of its [N, K] matrix; group g has matrix `offset + g`."""
    if not lhs_MK.shape[0]:
        return jnp.zeros((0, rhs.shape[1 if transposed else 2]), dtype)
    blocks = _cut(lhs_MK.shape[0], sizes_G)

    def step(row_and_group: tuple[Array, Array]) -> Array:
        row_br, group_b = row_and_group
        matrices = rhs.at[offset + group_b].get(mode="promise_in_bounds").astype(lhs_MK.dtype)
        formula = "brk,bnk->brn" if transposed else "brk,bkn->brn"
        return jnp.einsum(formula, _taken(lhs_MK, row_br), matrices, preferred_element_type=jnp.float32).astype(dtype)

    out_SbrN = jax.lax.map(step, (blocks.row_Sbr, blocks.group_Sb))
    return out_SbrN.reshape(-1, out_SbrN.shape[-1]).at[blocks.place_M].get(mode="promise_in_bounds")


def blocked_weight_gradient(
    lhs_MK: Float[Array, "M K"],
    grad_MN: Float[Array, "M N"],
    sizes_G: Int[Array, " G"],
    offset: Int[Array, ""],
    *,
    num_matrices: int,
    dtype: jnp.dtype,
) -> Float[Array, "G_all K N"]:
    """For each group the product of its transposed rows with the rows of the gradient, in float32; zeros for other matrices."""
    blocks = _cut(lhs_MK.shape[0], sizes_G)

    def step(total: Array, row_and_group: tuple[Array, Array]) -> tuple[Array, None]:
        row_br, group_b = row_and_group
        rows, grads = _taken(lhs_MK, row_br), _taken(grad_MN, row_br)
        products = jnp.einsum("brk,brn->bkn", rows, grads, preferred_element_type=jnp.float32)

        def add(block: Array, total: Array) -> Array:
            """One by one: a scatter of blocks of one group would add them in any order."""
            at = offset + group_b[block]
            matrix = jax.lax.dynamic_index_in_dim(total, at, keepdims=False) + products[block]
            return jax.lax.dynamic_update_index_in_dim(total, matrix, at, 0)

        return jax.lax.fori_loop(0, len(group_b), add, total), None

    zeros = jnp.zeros((num_matrices, lhs_MK.shape[1], grad_MN.shape[1]), jnp.float32)
    zeros = as_varying(zeros, varying_axes(lhs_MK, grad_MN, sizes_G, offset))
    return jax.lax.scan(step, zeros, (blocks.row_Sbr, blocks.group_Sb))[0].astype(dtype)
