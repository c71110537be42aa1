"""Memory layouts that XLA would otherwise choose badly."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def transposed_copy(x: jax.Array) -> jax.Array:
    """The transpose of the last two axes, as the left operand of a product.

    XLA folds a plain transpose into the product. That is what TPU and GPU want, but XLA:CPU has no fast product with a
    transposed left operand (and none at all for bf16), so that there the transpose is laid out as such.
    """
    return jax.lax.platform_dependent(x, cpu=_copy, default=lambda x: jnp.swapaxes(x, -1, -2))


def _copy(x: jax.Array) -> jax.Array:
    *batch, rows, columns = x.shape
    if rows % 2:
        return jnp.swapaxes(x, -1, -2)
    n = len(batch)
    # With the rows as two axes it is no longer a transpose of matrices, and is not folded.
    x = x.reshape(*batch, 2, rows // 2, columns)
    return x.transpose(*range(n), n + 2, n, n + 1).reshape(*batch, columns, rows)
