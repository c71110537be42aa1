"""Gate and up projection of an expert layer with SwiGLU and the rows' weights, in one kernel that writes the hidden rows only.

`[M, 2 F]` never goes to memory where nothing is kept for a backward pass: in inference, and in the forward pass of a layer that is
rematerialised. Where the backward pass needs gate and up they are formed by the plain product.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import grouped_matmul as plain
from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.grouped_product import grouped_swiglu as fused
from pallas_kernels.swiglu_gradient import swiglu_gradient
from pallas_kernels.tiling import product_tiling


def grouped_swiglu(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    weights_M: jax.Array,
    group_sizes_G: jax.Array,
    *,
    group_offset: int | jax.Array | None = None,
    chip: Chip | None = None,
    interpret: plain.Interpret = False,
) -> jax.Array:
    """`weight * silu(row @ gate) * (row @ up)` of each row with the matrices of its group, accumulated in float32. Differentiable in
    `lhs_MK`, `rhs_GKN` and `weights_M`.

    Args:
      lhs_MK: rows sorted by group; bfloat16 or float32, K a multiple of 128.
      rhs_GKN: of each group the gate matrix and, right of it, the up matrix, both F = N / 2 columns wide, F a multiple of 128.
      weights_M: of the rows, of any floating dtype.
      group_sizes_G, group_offset, chip, interpret: as in `grouped_matmul`.

    Returns:
      [M, F], of the dtype of `lhs_MK`.

    Raises:
      ValueError, TypeError: as `grouped_matmul`; or weights that are not one floating-point number per row.
    """
    plain.check_operands(lhs_MK, rhs_GKN, group_sizes_G, group_offset)
    if rhs_GKN.shape[2] % 256:
        raise ValueError(f"N must be two halves of a multiple of 128 columns each, got {rhs_GKN.shape[2]}; pad each half with zeros.")
    if weights_M.shape != lhs_MK.shape[:1]:
        raise ValueError(f"weights_M must have one weight for each of {lhs_MK.shape[0]} rows, got shape {weights_M.shape}.")
    if not jnp.issubdtype(weights_M.dtype, jnp.floating):
        raise TypeError(f"weights_M must be floating-point numbers, got {weights_M.dtype}.")
    chip = chip or current_chip()
    if chip is None:
        raise ValueError(
            "the current device is not a TPU, so there is no chip to tile for: pass chip=, set a mesh of TPU devices, or use "
            "weighted_swiglu on grouped_matmul_reference."
        )
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    return _grouped_swiglu((lhs_MK.dtype, chip, interpret), lhs_MK, rhs_GKN, weights_M, group_sizes_G.astype(jnp.int32), offset)


def weighted_swiglu(gate_up_MN: jax.Array, weights_M: jax.Array) -> jax.Array:
    """`weight * silu(gate) * up` of rows that hold gate and, right of it, up; [M, N / 2]."""
    gate_MF, up_MF = jnp.split(gate_up_MN, 2, -1)
    return jax.nn.silu(gate_MF) * up_MF * weights_M[:, None].astype(gate_MF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(
    static: plain.Static, lhs_MK: jax.Array, rhs_GKN: jax.Array, weights_M: jax.Array, sizes_G: jax.Array, offset: jax.Array
) -> jax.Array:
    dtype, chip, interpret = static
    num_rows, depth = lhs_MK.shape
    columns, itemsize = rhs_GKN.shape[2] // 2, lhs_MK.dtype.itemsize
    tiling = product_tiling(chip, num_rows, depth, columns, sizes_G.size, itemsize, dtype.itemsize, gated=True)
    return fused(lhs_MK, rhs_GKN, weights_M, sizes_G, offset, dtype=dtype, tiling=tiling, interpret=interpret)


def _forward(static: plain.Static, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    lhs_MK, rhs_GKN, weights_M, *groups = operands
    gate_up_MN = plain.product(static, lhs_MK, rhs_GKN, *groups)
    return weighted_swiglu(gate_up_MN, weights_M), (*operands, gate_up_MN)


def _backward(static: plain.Static, saved: tuple[jax.Array, ...], grad_MF: jax.Array) -> tuple[Any, ...]:
    lhs_MK, rhs_GKN, weights_M, sizes_G, offset, gate_up_MN = saved
    grad_gate_up_MN, grad_weights_M = swiglu_gradient(gate_up_MN, weights_M, grad_MF.astype(gate_up_MN.dtype), interpret=static[2])
    grad_lhs_MK, grad_rhs_GKN = plain.gradients(static, lhs_MK, rhs_GKN, sizes_G, offset, grad_gate_up_MN)
    return grad_lhs_MK, grad_rhs_GKN, grad_weights_M, None, None


# Where no residual is kept, the forward pass is `_grouped_swiglu`, not `_forward`.
_grouped_swiglu.defvjp(_forward, _backward, optimize_remat=True)
