"""The two products of an expert: what they are computed in is a choice of the MoE layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.fp8 import grouped_matmul_fp8
from interns1pro_jax.ops.grouped_matmul import grouped_matmul
from interns1pro_jax.ops.grouped_swiglu import grouped_swiglu
from pallas_kernels.grouped_swiglu import weighted_swiglu

Offset = int | Int[Array, ""] | None


@dataclasses.dataclass(frozen=True)
class ExpertProducts:
    """Functions with the arguments of `ops.grouped_swiglu` and `ops.grouped_matmul`; both differentiable in rows, matrices and weights."""

    swiglu: Callable[..., Float[Array, "M F"]]
    product: Callable[..., Float[Array, "M N"]]


def product_fp8(
    lhs_MK: Float[Array, "M K"],
    rhs: Float[Array, "G rows columns"],
    group_sizes_G: Int[Array, " G_used"],
    *,
    transposed: bool = False,
    group_offset: Offset = None,
) -> Float[Array, "M N"]:
    """`grouped_matmul` with rows, matrices and gradients in e4m3 (`ops.fp8`)."""
    if group_offset is not None:
        rhs = jax.lax.dynamic_slice_in_dim(rhs, jnp.asarray(group_offset, jnp.int32), group_sizes_G.size)
    rhs_GKN = jnp.swapaxes(rhs, 1, 2) if transposed else rhs
    return grouped_matmul_fp8(lhs_MK, rhs_GKN, group_sizes_G, preferred_element_type=lhs_MK.dtype)


def unfused(product: Callable[..., Array]) -> ExpertProducts:
    """Products by one function, with the SwiGLU and the rows' weights between them as operations of their own."""

    def swiglu(lhs_MK: Array, rhs_GKN: Array, weights_M: Array, group_sizes_G: Array, *, group_offset: Offset = None) -> Array:
        return weighted_swiglu(product(lhs_MK, rhs_GKN, group_sizes_G, group_offset=group_offset), weights_M)

    return ExpertProducts(swiglu, product)


# By `TextConfig.expert_products`.
EXPERT_PRODUCTS: Mapping[str, ExpertProducts] = {
    "dtype": ExpertProducts(grouped_swiglu, grouped_matmul),  # in the model's dtype
    "fp8": unfused(product_fp8),
}


def with_adapters(products: ExpertProducts, into: tuple[Array, Array], out_of: tuple[Array, Array], scale: float) -> ExpertProducts:
    """The products of matrices W + scale * A B, of which W alone is given where they are called; `into` and `out_of` are the A and B of
    the gate and up projection and of the down projection, of every group. W has no gradient that anything needs."""

    def low_rank(rows_MK: Array, a_GKR: Array, b_GRN: Array, sizes_G: Array) -> Array:
        return scale * grouped_matmul(grouped_matmul(rows_MK, a_GKR, sizes_G), b_GRN, sizes_G)

    def swiglu(lhs_MK: Array, rhs_GKN: Array, weights_M: Array, group_sizes_G: Array, *, group_offset: Offset = None) -> Array:
        whole = products.product(lhs_MK, rhs_GKN, group_sizes_G, group_offset=group_offset)
        return weighted_swiglu(whole + low_rank(lhs_MK, *into, group_sizes_G), weights_M)

    def product(lhs_MK: Array, rhs: Array, group_sizes_G: Array, *, transposed: bool = False, group_offset: Offset = None) -> Array:
        whole = products.product(lhs_MK, rhs, group_sizes_G, transposed=transposed, group_offset=group_offset)
        return whole + low_rank(lhs_MK, *out_of, group_sizes_G)

    return ExpertProducts(swiglu, product)
