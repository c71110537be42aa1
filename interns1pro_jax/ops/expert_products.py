"""The products of an expert: what they are computed in is a choice of the MoE layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.fp8 import grouped_matmul_fp8
from interns1pro_jax.ops.grouped_matmul import grouped_matmul, pad_to_lanes
from interns1pro_jax.ops.varying import match_varying
from pallas_kernels import expert_mlp as tpu
from pallas_kernels.chips import current_chip

Offset = int | Int[Array, ""] | None
Product = Callable[..., Float[Array, "M N"]]
ExpertMlp = Callable[..., Float[Array, "M D"]]


@dataclasses.dataclass(frozen=True)
class ExpertProducts:
    """Functions with the arguments of `expert_mlp`, and of `grouped_matmul` for one product alone; both differentiable in rows, matrices
    and weights."""

    mlp: ExpertMlp
    product: Product


def expert_mlp(
    lhs_MK: Float[Array, "M K"],
    wi_GKN: Float[Array, "G K two_F"],
    wo: Float[Array, "G rows columns"],
    weights_M: Float[Array, " M"],
    group_sizes_G: Int[Array, " G_used"],
    *,
    transposed: bool = False,
    group_offset: Offset = None,
) -> Float[Array, "M D"]:
    """`(weight * silu(row @ gate) * (row @ up)) @ down`, where gate and up are the left and the right half of the row's group's matrix of
    `wi_GKN`, and down its matrix of `wo`, [F, D] or `transposed` [D, F]; the other arguments are those of `grouped_matmul`. Kernels that
    know of each other on TPU, grouped products and XLA elsewhere."""
    if (chip := current_chip()) is None:
        options = {"transposed": transposed, "group_offset": group_offset}
        return separate(grouped_matmul, grouped_matmul)(lhs_MK, wi_GKN, wo, weights_M, group_sizes_G, **options)
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    operands = match_varying(lhs_MK, wi_GKN, wo, weights_M, group_sizes_G, offset)
    lhs_MK, wi_GKN, wo, weights_M, group_sizes_G, offset = operands
    # Toy models are narrower than the kernels' lanes: see `grouped_matmul`.
    (groups, _, columns), width = wi_GKN.shape, wo.shape[1 if transposed else 2]
    halves_GK2F = pad_to_lanes(pad_to_lanes(wi_GKN.astype(lhs_MK.dtype), 1).reshape(groups, -1, 2, columns // 2), 3)
    out_MD = tpu.expert_mlp(
        pad_to_lanes(lhs_MK, 1),
        halves_GK2F.reshape(*halves_GK2F.shape[:2], -1),
        pad_to_lanes(pad_to_lanes(wo.astype(lhs_MK.dtype), 1), 2),
        weights_M,
        group_sizes_G,
        transposed=transposed,
        group_offset=offset,
        chip=chip,
    )
    return out_MD[:, :width]


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


def separate(into: Product, out_of: Product) -> ExpertMlp:
    """Two products, with the SwiGLU and the rows' weights between them as operations of their own."""

    def mlp(
        lhs_MK: Array, wi: Array, wo: Array, weights_M: Array, sizes_G: Array, *, transposed=False, group_offset: Offset = None
    ) -> Array:
        hidden_MF = tpu.weighted_swiglu(into(lhs_MK, wi, sizes_G, group_offset=group_offset), weights_M)
        return out_of(hidden_MF, wo, sizes_G, transposed=transposed, group_offset=group_offset)

    return mlp


def unfused(product: Product) -> ExpertProducts:
    """Both products by one function."""
    return ExpertProducts(separate(product, product), product)


# By `TextConfig.expert_products`.
EXPERT_PRODUCTS: Mapping[str, ExpertProducts] = {
    "dtype": ExpertProducts(expert_mlp, grouped_matmul),  # in the model's dtype
    "fp8": unfused(product_fp8),
}


def with_adapters(product: Product, into: tuple[Array, Array], out_of: tuple[Array, Array], scale: float) -> ExpertMlp:
    """Experts of matrices W + scale * A B, of which W alone is given where they are called; `into` and `out_of` are the A and B of the gate
    and up projection and of the down projection, of every group. W has no gradient that anything needs."""

    def adapted(a_GKR: Array, b_GRN: Array) -> Product:
        def whole(lhs_MK: Array, rhs: Array, sizes_G: Array, **options) -> Array:
            low_rank = grouped_matmul(grouped_matmul(lhs_MK, a_GKR, sizes_G), b_GRN, sizes_G)
            return product(lhs_MK, rhs, sizes_G, **options) + scale * low_rank

        return whole

    return separate(adapted(*into), adapted(*out_of))
