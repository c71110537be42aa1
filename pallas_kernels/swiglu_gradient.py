"""Gradients of `expert_mlp.weighted_swiglu` on TPU, and its result for the gradient of the matrices behind it, in one pass over the rows.

XLA makes the gradients of gate and up apart and joins them by another pass that reads and writes both, and makes the result by a third.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shapes import varying_like

_LANES = 128
_VMEM = 6 << 20  # bytes of a block of all operands and results, where 128 rows take no more; there are two of each
_SPILLED = 16  # bytes that the compiler spills besides for each number of the hidden rows' block; read off its refusals of wide rows
_SLACK = 2 << 20
_DEFAULT_VMEM = 16 << 20  # bytes that the compiler gives a kernel that does not ask for more


def swiglu_gradient(
    gate_up_MN: jax.Array, weights_M: jax.Array, grad_MF: jax.Array, *, interpret: bool | pltpu.InterpretParams = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `weight * silu(gate) * up` with respect to `gate_up_MN` (gate and, right of it, up) and `weights_M`, from that of the
    result, and the result [M, F]; computed in float32, F = N / 2 a multiple of 128. They have the dtypes of what they are gradients of.

    The compiler refuses what does not fit the vector memory. For 64 MiB, F of 12,288 in bfloat16 and 7,680 in float32 were compiled, and
    14,336 in bfloat16 was refused."""
    num_rows, columns = grad_MF.shape
    rows, row_bytes = block_rows(gate_up_MN.shape[1], gate_up_MN.dtype.itemsize)
    blocks = pl.cdiv(num_rows, rows)
    # A number per row lies on lanes: spread over a register's width it would be a tenth of all bytes.
    weights = jnp.pad(weights_M.astype(jnp.float32), (0, blocks * rows - num_rows)).reshape(blocks, rows // _LANES, _LANES)

    needed = rows * (2 * row_bytes + _SPILLED * columns)

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda i: (i, 0))

    per_row = pl.BlockSpec((1, *weights.shape[1:]), lambda i: (i, 0, 0))
    shapes = ((gate_up_MN.shape, gate_up_MN.dtype), (weights.shape, jnp.float32), (grad_MF.shape, gate_up_MN.dtype))
    grad_gate_up_MN, grad_weights, hidden_MF = pl.pallas_call(
        _kernel,
        out_shape=tuple(varying_like(shape, dtype, gate_up_MN, weights, grad_MF) for shape, dtype in shapes),
        grid=(blocks,),
        in_specs=[block(2 * columns), per_row, block(columns)],
        out_specs=(block(2 * columns), per_row, block(columns)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=needed + _SLACK if needed > _DEFAULT_VMEM else None
        ),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=num_rows * columns, bytes_accessed=num_rows * row_bytes),
        interpret=interpret,
        name="swiglu_gradient",
    )(gate_up_MN, weights, grad_MF)
    return grad_gate_up_MN, grad_weights.reshape(-1)[:num_rows].astype(weights_M.dtype), hidden_MF


def block_rows(columns: int, itemsize: int) -> tuple[int, int]:
    """Rows of a block of the kernel, and bytes of a row of all operands and results, for so many columns of gate and up together."""
    row_bytes = 3 * columns * itemsize + 2 * 4
    return min(max(_VMEM // row_bytes // _LANES, 1), 4) * _LANES, row_bytes


def _kernel(gate_up, weights, grad, grad_gate_up, grad_weights, hidden) -> None:  # type: ignore[no-untyped-def]
    columns = grad.shape[1]
    for part in range(weights.shape[1]):
        rows = pl.ds(part * _LANES, _LANES)
        weight, total = jnp.broadcast_to(weights[0, part : part + 1], (_LANES, _LANES)).T, jnp.zeros((_LANES, _LANES), jnp.float32)
        for start in range(0, columns, _LANES):
            gate_at, up_at = pl.ds(start, _LANES), pl.ds(columns + start, _LANES)
            gate, up, given = (x.astype(jnp.float32) for x in (gate_up[rows, gate_at], gate_up[rows, up_at], grad[rows, gate_at]))
            sigmoid = jax.nn.sigmoid(gate)
            silu, weighted = gate * sigmoid, given * weight
            result = silu * up
            grad_gate_up[rows, gate_at] = (weighted * up * (sigmoid + silu * (1 - sigmoid))).astype(grad_gate_up.dtype)
            grad_gate_up[rows, up_at] = (weighted * silu).astype(grad_gate_up.dtype)
            hidden[rows, gate_at] = (result * weight).astype(hidden.dtype)
            total += given * result
        grad_weights[0, part : part + 1] = total.T.sum(0, keepdims=True)
