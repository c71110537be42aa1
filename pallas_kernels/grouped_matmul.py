"""Grouped matrix product on TPU: rows times the matrix of their group, and both of its gradients, one kernel each.

`grouped_matmul` is differentiable; `grouped_matmul_reference` is its definition in plain `jax.numpy`, for any platform.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.grouped_outer import grouped_outer
from pallas_kernels.grouped_product import grouped_product
from pallas_kernels.order import after
from pallas_kernels.tiling import outer_tiling, product_tiling

Interpret = bool | pltpu.InterpretParams


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transposed: bool = False,
    group_offset: int | jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
    chip: Chip | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """Each row times the matrix of its group, accumulated in float32. Differentiable in `lhs_MK` and `rhs`.

    Args:
      lhs_MK: rows sorted by group; bfloat16 or float32, K and N multiples of 128.
      rhs: one matrix [K, N] per group, of the same dtype; more than `group_sizes_G` has groups if they are part of a longer stack.
      group_sizes_G: rows of each group; they must sum to M. Empty groups get a gradient of exactly zero.
      transposed: the matrices are given as [N, K].
      group_offset: matrix of the first group.
      preferred_element_type: dtype of the result; default that of `lhs_MK`.
      chip: what to tile for; default the chip of the mesh in force or of the default device.
      interpret: emulates the kernels on any platform.

    Returns:
      [M, N].

    Raises:
      ValueError: ranks, shapes or sizes do not fit together, K or N is no multiple of 128, or the current device is no supported TPU.
      TypeError: dtypes that the kernels do not take.
    """
    check_operands(lhs_MK, rhs, group_sizes_G, group_offset, transposed=transposed)
    chip = chip or current_chip()
    if chip is None:
        raise ValueError(
            "the current device is not a TPU, so there is no chip to tile for: pass chip=, set a mesh of TPU devices, or use "
            "grouped_matmul_reference."
        )
    dtype = jnp.dtype(preferred_element_type or lhs_MK.dtype)
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    return _grouped_matmul((dtype, chip, interpret), transposed, lhs_MK, rhs, group_sizes_G.astype(jnp.int32), offset)


def grouped_matmul_reference(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    group_offset: int | jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """`grouped_matmul` by its definition: every matrix times every row, of which one product is kept."""
    group_M = jnp.searchsorted(jnp.cumsum(group_sizes_G), jnp.arange(lhs_MK.shape[0]), side="right")
    mine_MG = group_M[:, None] == jnp.arange(group_sizes_G.size)
    used_GKN = jax.lax.dynamic_slice_in_dim(rhs_GKN, 0 if group_offset is None else group_offset, group_sizes_G.size)
    products_GMN = jnp.einsum("mk,gkn->gmn", lhs_MK, used_GKN.astype(lhs_MK.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("gmn,mg->mn", products_GMN, mine_MG.astype(jnp.float32)).astype(preferred_element_type or lhs_MK.dtype)


def check_operands(
    lhs_MK: jax.Array | jax.ShapeDtypeStruct,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    group_offset: int | jax.Array | None,
    *,
    transposed: bool = False,
) -> None:
    """Raises ValueError or TypeError with what is wrong, what it is and what to do."""
    check_shapes(lhs_MK, rhs_GKN, group_sizes_G, group_offset, transposed=transposed)
    if lhs_MK.dtype not in (jnp.bfloat16, jnp.float32) or rhs_GKN.dtype != lhs_MK.dtype:
        raise TypeError(f"lhs_MK and rhs_GKN must both be bfloat16 or both float32, got {lhs_MK.dtype} and {rhs_GKN.dtype}; cast them.")


def check_shapes(
    lhs_MK: jax.Array | jax.ShapeDtypeStruct,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    group_offset: int | jax.Array | None,
    *,
    transposed: bool = False,
) -> None:
    """Raises ValueError or TypeError if rows, matrices and sizes do not fit together, whatever the operands' dtypes."""
    for name, x, rank in (("lhs_MK", lhs_MK, 2), ("rhs_GKN", rhs_GKN, 3), ("group_sizes_G", group_sizes_G, 1)):
        if x.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {x.shape}.")
    if not jnp.issubdtype(group_sizes_G.dtype, jnp.integer):
        raise TypeError(f"group_sizes_G must be integers, got {group_sizes_G.dtype}.")
    depth, columns = rhs_GKN.shape[:0:-1] if transposed else rhs_GKN.shape[1:]
    if lhs_MK.shape[1] != depth:
        raise ValueError(f"rows have {lhs_MK.shape[1]} elements but matrices have {depth} rows: {lhs_MK.shape}, {rhs_GKN.shape}.")
    for name, size in (("K", depth), ("N", columns)):
        if size % 128:
            raise ValueError(f"{name} must be a multiple of 128, got {size}; pad the operands with zeros.")
    groups, matrices = group_sizes_G.size, rhs_GKN.shape[0]
    if groups == 0 or lhs_MK.shape[0] == 0:
        raise ValueError(f"there must be at least one row and one group, got {lhs_MK.shape[0]} and {groups}.")
    if groups > matrices or (group_offset is None and groups != matrices):
        raise ValueError(
            f"{groups} groups but {matrices} matrices; to use part of a stack, give group_offset and at least as many matrices."
        )
    if not isinstance(group_sizes_G, jax.core.Tracer):
        sizes = np.asarray(group_sizes_G)  # a constant, also while something else is traced
        if sizes.sum() != lhs_MK.shape[0] or sizes.min() < 0:
            raise ValueError(f"group_sizes_G must be rows that sum to M = {lhs_MK.shape[0]}, got {sizes} (sum {sizes.sum()}).")


Static = tuple[jnp.dtype, Chip, Interpret]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(
    static: Static, transposed: bool, lhs_MK: jax.Array, rhs: jax.Array, sizes_G: jax.Array, offset: jax.Array
) -> jax.Array:
    return product(static, lhs_MK, rhs, sizes_G, offset, transposed=transposed)


def _forward(static: Static, transposed: bool, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(static, transposed, *operands), operands


def _backward(static: Static, transposed: bool, operands: tuple[jax.Array, ...], grad_MN: jax.Array) -> tuple[Any, ...]:
    lhs_MK, rhs, sizes_G, offset = operands
    _, chip, interpret = static
    grad_MN = grad_MN.astype(lhs_MK.dtype)
    grad_lhs_MK = product((lhs_MK.dtype, chip, interpret), grad_MN, rhs, sizes_G, offset, transposed=not transposed)
    # What is sent back to the tokens' devices is needed before the gradient of the weights, and takes less time on the links.
    grad_rhs = weight_gradient(static, lhs_MK, rhs, after(sizes_G, grad_lhs_MK), offset, grad_MN, transposed=transposed)
    return grad_lhs_MK, grad_rhs, None, None


_grouped_matmul.defvjp(_forward, _backward)


def weight_gradient(
    static: Static,
    lhs_MK: jax.Array,
    rhs: jax.Array,
    sizes_G: jax.Array,
    offset: jax.Array,
    grad_MN: jax.Array,
    *,
    transposed: bool = False,
) -> jax.Array:
    """Of `rhs`, from that of the product of `lhs_MK` with it."""
    _, chip, interpret = static
    left, right = (grad_MN, lhs_MK) if transposed else (lhs_MK, grad_MN)
    (num_rows, depth), columns, itemsize = left.shape, right.shape[1], left.dtype.itemsize
    tiling = outer_tiling(chip, num_rows, depth, columns, sizes_G.size, itemsize, rhs.dtype.itemsize)
    grad_rhs = grouped_outer(left, right, sizes_G, dtype=rhs.dtype, tiling=tiling, interpret=interpret)
    if rhs.shape[0] > sizes_G.size:
        grad_rhs = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(rhs), grad_rhs, offset, axis=0)
    return grad_rhs


def product(
    static: Static, lhs: jax.Array, rhs: jax.Array, sizes_G: jax.Array, offset: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Rows times the matrices of their groups, or times these transposed; not differentiable."""
    dtype, chip, interpret = static
    (num_rows, depth), columns = lhs.shape, rhs.shape[1 if transposed else 2]
    tiling = product_tiling(chip, num_rows, depth, columns, sizes_G.size, lhs.dtype.itemsize, dtype.itemsize, transposed=transposed)
    return grouped_product(lhs, rhs, sizes_G, offset, transposed=transposed, dtype=dtype, tiling=tiling, interpret=interpret)
