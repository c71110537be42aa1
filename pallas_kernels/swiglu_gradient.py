"""Gradients of `grouped_swiglu.weighted_swiglu` on TPU in one pass over the rows. XLA makes those of gate and up apart, and joins them by
another pass that reads and writes both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shapes import varying_like

_LANES = 128
_PACK = 16  # rows of a tile of bfloat16
_VMEM = 6 << 20  # bytes of a block of all operands and results; there are two of each


def swiglu_gradient(
    gate_up_MN: jax.Array, weights_M: jax.Array, grad_MF: jax.Array, *, interpret: bool | pltpu.InterpretParams = False
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `weight * silu(gate) * up` with respect to `gate_up_MN` (gate and, right of it, up) and `weights_M`, from that of the
    result, computed in float32; F = N / 2 a multiple of 128. They have the dtypes of what they are gradients of."""
    num_rows, columns = grad_MF.shape
    rows, row_bytes = block_rows(gate_up_MN.shape[1], gate_up_MN.dtype.itemsize)
    weights = jnp.broadcast_to(weights_M.astype(jnp.float32)[:, None], (num_rows, _LANES))

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda i: (i, 0))

    grad_gate_up_MN, grad_weights = pl.pallas_call(
        _kernel,
        out_shape=(
            varying_like(gate_up_MN.shape, gate_up_MN.dtype, gate_up_MN, weights, grad_MF),
            varying_like(weights.shape, jnp.float32, gate_up_MN, weights, grad_MF),
        ),
        grid=(pl.cdiv(num_rows, rows),),
        in_specs=[block(2 * columns), block(_LANES), block(columns)],
        out_specs=(block(2 * columns), block(_LANES)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=num_rows * columns, bytes_accessed=num_rows * row_bytes),
        interpret=interpret,
        name="swiglu_gradient",
    )(gate_up_MN, weights, grad_MF)
    return grad_gate_up_MN, grad_weights.sum(1).astype(weights_M.dtype)


def block_rows(columns: int, itemsize: int) -> tuple[int, int]:
    """Rows of a block of the kernel, and bytes of a row of all operands and results, for so many columns of gate and up together."""
    row_bytes = (2 * columns + columns // 2) * itemsize + 2 * _LANES * 4
    return min(max(_VMEM // row_bytes // _PACK, 1), 32) * _PACK, row_bytes


def _kernel(gate_up, weights, grad, grad_gate_up, grad_weights) -> None:  # type: ignore[no-untyped-def]
    columns = grad.shape[1]
    weight, total = weights[...], jnp.zeros(weights.shape, jnp.float32)
    for start in range(0, columns, _LANES):
        gate_at, up_at = pl.ds(start, _LANES), pl.ds(columns + start, _LANES)
        gate, up, given = (x.astype(jnp.float32) for x in (gate_up[:, gate_at], gate_up[:, up_at], grad[:, gate_at]))
        sigmoid = jax.nn.sigmoid(gate)
        silu, weighted = gate * sigmoid, given * weight
        grad_gate_up[:, gate_at] = (weighted * up * (sigmoid + silu * (1 - sigmoid))).astype(grad_gate_up.dtype)
        grad_gate_up[:, up_at] = (weighted * silu).astype(grad_gate_up.dtype)
        total += given * silu * up
    grad_weights[...] = total
