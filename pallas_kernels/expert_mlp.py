"""The experts of an expert layer: gate and up projection with SwiGLU and the rows' weights, and the down projection.

Where nothing is kept for a backward pass (in inference, and in the forward pass of a layer that is rematerialised) gate and up never go
to memory: one kernel forms the hidden rows from their sums. Where the backward pass needs gate and up they are formed by the plain
product, and kept instead of the hidden rows, which the kernel of SwiGLU's gradients forms again while it reads gate and up.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import grouped_matmul as plain
from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.grouped_product import grouped_swiglu
from pallas_kernels.order import after
from pallas_kernels.swiglu_gradient import swiglu_gradient
from pallas_kernels.tiling import product_tiling


def expert_mlp(
    lhs_MK: jax.Array,
    wi_GKN: jax.Array,
    wo: jax.Array,
    weights_M: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transposed: bool = False,
    group_offset: int | jax.Array | None = None,
    chip: Chip | None = None,
    interpret: plain.Interpret = False,
) -> jax.Array:
    """`(weight * silu(row @ gate) * (row @ up)) @ down` of each row with the matrices of its group, every product accumulated in float32.
    Differentiable in `lhs_MK`, `wi_GKN`, `wo` and `weights_M`.

    Args:
      lhs_MK: rows sorted by group; bfloat16 or float32, K a multiple of 128.
      wi_GKN: of each group the gate matrix and, right of it, the up matrix, both F = N / 2 columns wide, F a multiple of 128.
      wo: of each group the down matrix [F, D], D a multiple of 128; `transposed`: [D, F].
      weights_M: of the rows, of any floating dtype.
      group_sizes_G, group_offset, chip, interpret: as in `grouped_matmul`.

    Returns:
      [M, D], of the dtype of `lhs_MK`.

    Raises:
      ValueError, TypeError: as `grouped_matmul`; or weights that are not one floating-point number per row.
    """
    plain.check_operands(lhs_MK, wi_GKN, group_sizes_G, group_offset)
    if wi_GKN.shape[2] % 256:
        raise ValueError(f"N must be two halves of a multiple of 128 columns each, got {wi_GKN.shape[2]}; pad each half with zeros.")
    hidden_MF = jax.ShapeDtypeStruct((lhs_MK.shape[0], wi_GKN.shape[2] // 2), lhs_MK.dtype)
    plain.check_operands(hidden_MF, wo, group_sizes_G, group_offset, transposed=transposed)
    if weights_M.shape != lhs_MK.shape[:1]:
        raise ValueError(f"weights_M must have one weight for each of {lhs_MK.shape[0]} rows, got shape {weights_M.shape}.")
    if not jnp.issubdtype(weights_M.dtype, jnp.floating):
        raise TypeError(f"weights_M must be floating-point numbers, got {weights_M.dtype}.")
    chip = chip or current_chip()
    if chip is None:
        raise ValueError(
            "the current device is not a TPU, so there is no chip to tile for: pass chip=, set a mesh of TPU devices, or use "
            "grouped_matmul_reference and weighted_swiglu."
        )
    static, offset = (lhs_MK.dtype, chip, interpret), jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    return _expert_mlp(static, transposed, lhs_MK, wi_GKN, wo, weights_M, group_sizes_G.astype(jnp.int32), offset)


def weighted_swiglu(gate_up_MN: jax.Array, weights_M: jax.Array) -> jax.Array:
    """`weight * silu(gate) * up` of rows that hold gate and, right of it, up; [M, N / 2]."""
    gate_MF, up_MF = jnp.split(gate_up_MN, 2, -1)
    return jax.nn.silu(gate_MF) * up_MF * weights_M[:, None].astype(gate_MF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_mlp(static: plain.Static, transposed: bool, *operands: jax.Array) -> jax.Array:
    lhs_MK, wi_GKN, wo, weights_M, sizes_G, offset = operands
    dtype, chip, interpret = static
    num_rows, depth = lhs_MK.shape
    columns, itemsize = wi_GKN.shape[2] // 2, dtype.itemsize
    tiling = product_tiling(chip, num_rows, depth, columns, sizes_G.size, itemsize, itemsize, gated=True)
    hidden_MF = grouped_swiglu(lhs_MK, wi_GKN, weights_M, sizes_G, offset, dtype=dtype, tiling=tiling, interpret=interpret)
    return plain.product(static, hidden_MF, wo, sizes_G, offset, transposed=transposed)


def _forward(static: plain.Static, transposed: bool, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    lhs_MK, wi_GKN, wo, weights_M, *groups = operands
    gate_up_MN = plain.product(static, lhs_MK, wi_GKN, *groups)
    hidden_MF = weighted_swiglu(gate_up_MN, weights_M)
    return plain.product(static, hidden_MF, wo, *groups, transposed=transposed), (*operands, gate_up_MN)


def _backward(static: plain.Static, transposed: bool, saved: tuple[jax.Array, ...], grad_MD: jax.Array) -> tuple[Any, ...]:
    lhs_MK, wi_GKN, wo, weights_M, sizes_G, offset, gate_up_MN = saved
    grad_MF = plain.product(static, grad_MD, wo, sizes_G, offset, transposed=not transposed)
    grad_gate_up_MN, grad_weights_M, hidden_MF = swiglu_gradient(gate_up_MN, weights_M, grad_MF, interpret=static[2])
    grad_lhs_MK = plain.product(static, grad_gate_up_MN, wi_GKN, sizes_G, offset, transposed=True)
    # What is sent back to the tokens' devices is needed before the gradients of the weights, and takes less time on the links.
    groups = after(sizes_G, grad_lhs_MK), offset
    grad_wi_GKN = plain.weight_gradient(static, lhs_MK, wi_GKN, *groups, grad_gate_up_MN)
    grad_wo = plain.weight_gradient(static, hidden_MF, wo, *groups, grad_MD, transposed=transposed)
    return grad_lhs_MK, grad_wi_GKN, grad_wo, grad_weights_M, None, None


# Where no residual is kept, the forward pass is `_expert_mlp`, not `_forward`.
_expert_mlp.defvjp(_forward, _backward, optimize_remat=True)
