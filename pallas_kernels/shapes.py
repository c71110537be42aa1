"""Types of kernels' operands and results."""

from __future__ import annotations

import jax
from jax.sharding import ManualAxisType


def varying_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """Type of a kernel's result that varies over the mesh axes over which any of its operands does."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=varying))


def full_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Of products inside a kernel: the matrix units would round float32 operands to bfloat16 if they are not told otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jax.numpy.float32 else jax.lax.Precision.DEFAULT
