"""Grouped products in FP8: the expert layers under the FP8 recipe (spec section 1.10).

Rows and their gradients are quantised on their way, by tiles of one row and 128 features, and matrices in blocks of 128 x 128, all to
e4m3 with power-of-two scales. Matrices are rounded to bfloat16 first: training, which has them in float32, and serving, which loads
bfloat16, then multiply by the same numbers. `grouped_matmul_fp8` is for training; `grouped_matmul_quantized` multiplies what is
quantised already, as in a released checkpoint. On TPU matrices and rows travel as bytes; elsewhere they are dequantised, which is exact,
and multiplied in bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference, pad_to_lanes
from interns1pro_jax.ops.quantization import dequantize_activations, dequantize_blocks, quantize_activations, quantize_blocks
from interns1pro_jax.ops.varying import match_varying
from pallas_kernels import grouped_fp8 as tpu
from pallas_kernels.chips import current_chip

Quantized = tuple[Array, Array]  # float8_e4m3fn values and float32 scales
Dtype = jax.typing.DTypeLike


def grouped_matmul_fp8(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K N"],
    group_sizes_G: Int[Array, " G"],
    *,
    preferred_element_type: Dtype = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, both quantised. Differentiable in `lhs_MK` and `rhs_GKN`, straight through the rounding.

    With q for quantised and g for the gradient of the result, q(x) q(w) has the gradients q(g) q(w)^T and q(x)^T q(g); the matrices'
    blocks are the same both ways. A row that is not finite in some tile gives a row of NaN, and touches no other row.

    Args:
      lhs_MK: rows, sorted by group.
      rhs_GKN: one matrix per group.
      group_sizes_G: rows of each group; they must sum to M. Empty groups get a gradient of exactly zero.
      preferred_element_type: dtype of the result.
    """
    lhs_MK, rhs_GKN, group_sizes_G = match_varying(lhs_MK, rhs_GKN, group_sizes_G)
    dtypes = (lhs_MK.dtype, rhs_GKN.dtype, jnp.dtype(preferred_element_type))
    return _grouped_matmul_fp8(dtypes, lhs_MK, rhs_GKN, group_sizes_G)


def grouped_matmul_quantized(
    lhs_MK: Float[Array, "M K"],
    lhs_scale: Float[Array, "M k"],
    rhs: Float[Array, "G rows columns"],
    rhs_scale: Float[Array, "G r c"],
    group_sizes_G: Int[Array, " G_used"],
    *,
    group_offset: int | Int[Array, ""] | None = None,
    transposed: bool = False,
    preferred_element_type: Dtype = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, of the numbers that values and scales stand for. Not differentiable.

    Args:
      lhs_MK, lhs_scale: rows sorted by group, as from `quantize_activations`.
      rhs, rhs_scale: one matrix [K, N] per group, or [N, K] if `transposed`, as from `quantize_blocks`. Values may be NaN only where the
        scale is.
      group_sizes_G: rows of each group; they must sum to M.
      group_offset: matrix of the first group, so that a stack of many layers' experts is read in place.
      preferred_element_type: dtype of the result.
    """
    if chip := current_chip():
        columns = rhs.shape[1 if transposed else 2]
        out_MN = tpu.grouped_matmul_fp8(
            pad_to_lanes(lhs_MK, 1), lhs_scale, pad_to_lanes(pad_to_lanes(rhs, 1), 2), rhs_scale, group_sizes_G,
            group_offset=group_offset, transposed=transposed, preferred_element_type=preferred_element_type, chip=chip,
        )  # fmt: skip
        return out_MN[:, :columns]
    if group_offset is not None:  # only what is used is dequantised
        rhs, rhs_scale = (jax.lax.dynamic_slice_in_dim(x, group_offset, group_sizes_G.size) for x in (rhs, rhs_scale))
    rhs = dequantize_blocks(rhs, rhs_scale, dtype=jnp.bfloat16)
    return grouped_matmul(
        dequantize_activations(lhs_MK, lhs_scale, dtype=jnp.bfloat16),
        rhs.swapaxes(1, 2) if transposed else rhs,
        group_sizes_G,
        preferred_element_type=jnp.dtype(preferred_element_type),
    )


def grouped_matmul_fp8_reference(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K N"],
    group_sizes_G: Int[Array, " G"],
    *,
    preferred_element_type: Dtype = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """`grouped_matmul_fp8` by its definition: the dense product of numbers that were quantised, and a gradient that is."""
    lhs_MK = _rounded(lambda x: dequantize_activations(*quantize_activations(x)), lhs_MK)
    rhs_GKN = _rounded(lambda w: dequantize_blocks(*quantize_matrices(w)), rhs_GKN)
    out_MN = grouped_matmul_reference(lhs_MK, rhs_GKN, group_sizes_G, preferred_element_type=jnp.float32)
    return _with_quantized_gradient(out_MN).astype(preferred_element_type)


def quantize_matrices(w_GKN: Float[Array, "*lead K N"]) -> Quantized:
    """Blocks of 128 x 128 of the matrices rounded to bfloat16, so that a float32 master and its bfloat16 export give the same."""
    rounded_GKN = jax.lax.reduce_precision(w_GKN.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)  # XLA may drop a conversion
    return quantize_blocks(rounded_GKN)


def quantize_gradients(grad_MN: Float[Array, "M N"]) -> Quantized:
    """Tiles of one row and 128 features, like activations but without a lower bound: gradients may be tiny."""
    return quantize_activations(grad_MN, min_amax=0.0)


Dtypes = tuple[jnp.dtype, jnp.dtype, jnp.dtype]  # of rows, matrices and result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul_fp8(dtypes: Dtypes, lhs_MK: Array, rhs_GKN: Array, sizes_G: Array) -> Array:
    return _forward(dtypes, lhs_MK, rhs_GKN, sizes_G)[0]


def _forward(dtypes: Dtypes, lhs_MK: Array, rhs_GKN: Array, sizes_G: Array):  # type: ignore[no-untyped-def]
    lhs, rhs = quantize_activations(lhs_MK), quantize_matrices(rhs_GKN)
    return grouped_matmul_quantized(*lhs, *rhs, sizes_G, preferred_element_type=dtypes[2]), (lhs, rhs, sizes_G)


def _backward(dtypes: Dtypes, saved: tuple[Quantized, Quantized, Array], grad_MN: Array) -> tuple[Array, Array, None]:
    lhs, rhs, sizes_G = saved
    grad = quantize_gradients(grad_MN)
    grad_lhs_MK = grouped_matmul_quantized(*grad, *rhs, sizes_G, transposed=True, preferred_element_type=dtypes[0])
    rows_MK, grad_MN = (dequantize_activations(*x, dtype=jnp.bfloat16) for x in (lhs, grad))
    # The product is linear in the matrices, so theirs do not matter; what is not used of it is not computed.
    _, pullback = jax.vjp(lambda rhs_GKN: grouped_matmul(rows_MK, rhs_GKN, sizes_G), jnp.zeros_like(rhs[0], dtypes[1]))
    return grad_lhs_MK, *pullback(grad_MN), None


_grouped_matmul_fp8.defvjp(_forward, _backward)


def _rounded(fake_quantize: Callable[[Array], Array], x: Array) -> Array:
    """`fake_quantize(x)` with the gradient of `x`."""
    rounded = jax.custom_vjp(lambda x: fake_quantize(x).astype(jnp.float32))
    rounded.defvjp(lambda x: (rounded(x), None), lambda _, grad: (grad.astype(x.dtype),))
    return rounded(x)


@jax.custom_vjp
def _with_quantized_gradient(x_MN: Array) -> Array:
    return x_MN


_with_quantized_gradient.defvjp(
    lambda x_MN: (x_MN, None), lambda _, grad_MN: (dequantize_activations(*quantize_gradients(grad_MN)).astype(grad_MN.dtype),)
)
