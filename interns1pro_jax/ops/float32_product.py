"""Products in float32, which the router needs whatever the rows are computed in (spec 9.4)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.chips import current_chip


def float32_product(
    formula: str, x: Float[Array, "*rows features"], weight: Float32[Array, "features results"]
) -> Float32[Array, "*rows results"]:
    """`jnp.einsum(formula, x, weight)` in float32.

    TPUs multiply bfloat16, and make a float32 product of six products of parts of both operands. Rows in bfloat16 are one part, so three
    products are as exact: for the result, and for the gradient of the matrix. The gradient of the rows is rounded to bfloat16, 2**-9 of
    it, so that three products of the two largest parts of both factors, 2**-16, are as good as all.
    """
    if current_chip() is None or x.dtype != jnp.bfloat16:
        return jnp.einsum(formula, x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    return split_product(formula, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def split_product(formula: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`float32_product` as a sum of products of bfloat16, on any device."""
    return sum(reversed([_product(formula, x, part) for part in _parts(weight)]))  # type: ignore[return-value]  # the small ones first


def _forward(formula: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return split_product(formula, x, weight), (x, weight)


def _backward(formula: str, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows, matrix, results = formula.replace("->", ",").split(",")
    grad_x = jnp.einsum(f"{results},{matrix}->{rows}", grad, weight, precision=jax.lax.Precision.HIGH)
    grad_weight = sum(reversed([_product(f"{rows},{results}->{matrix}", x, part) for part in _parts(grad)]))
    return grad_x.astype(x.dtype), grad_weight  # type: ignore[return-value]


split_product.defvjp(_forward, _backward)


def _parts(x: jax.Array) -> list[jax.Array]:
    """Three arrays of bfloat16, 8 bits of each number in each, whose sum is `x`."""
    parts = []
    for _ in range(3):
        # XLA takes a conversion to bfloat16 and back for nothing.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def _product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
