"""Grouped matrix product in FP8: quantised rows times the quantised matrix of their group.

Numbers are e4m3 values times power-of-two scales, one scale per row and 128 elements of the contraction, and one per block of 128 x 128
of a matrix. `grouped_matmul_fp8` runs on TPU; `grouped_matmul_fp8_reference` is its definition in plain `jax.numpy`, for any platform.
Both multiply the very numbers that the operands stand for and sum in float32: they differ by the order of the sums only, and are equal
bit for bit where sums are exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.grouped_matmul import check_shapes, grouped_matmul_reference
from pallas_kernels.scaled_product import BLOCK, scaled_product
from pallas_kernels.tiling import scaled_tiling

E4M3 = jnp.float8_e4m3fn
# Powers of two whose product with any e4m3 number is zero or a normal number of bfloat16.
SCALES = (2.0**-117, 2.0**120)


def grouped_matmul_fp8(
    lhs_MK: jax.Array,
    lhs_scale: jax.Array,
    rhs_GKN: jax.Array,
    rhs_scale: jax.Array,
    group_sizes_G: jax.Array,
    *,
    group_offset: int | jax.Array | None = None,
    transposed: bool = False,
    preferred_element_type: jax.typing.DTypeLike = jnp.bfloat16,
    chip: Chip | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Each row times the matrix of its group, accumulated in float32. Not differentiable.

    Args:
      lhs_MK: rows sorted by group, float8_e4m3fn; K and N multiples of 128. No value may be NaN: what is not finite belongs into the
        scale, as NaN.
      lhs_scale: [M, K / 128] float32, powers of two from 2^-117 to 2^120 or NaN.
      rhs_GKN: one matrix per group, likewise; [G, N, K] if `transposed`. More than `group_sizes_G` has groups if they are part of a
        longer stack.
      rhs_scale: [G, K / 128, N / 128] float32, likewise; [G, N / 128, K / 128] if `transposed`.
      group_sizes_G: rows of each group; they must sum to M.
      group_offset: matrix of the first group.
      transposed: multiplies by the transposes of the matrices.
      preferred_element_type: dtype of the result.
      chip: what to tile for; default the chip of the mesh in force or of the default device.
      interpret: emulates the kernel on any platform.

    Returns:
      [M, N].

    Raises:
      ValueError: ranks, shapes, sizes or scales do not fit, K or N is no multiple of 128, or the current device is no supported TPU.
      TypeError: dtypes that the kernel does not take.
    """
    _check(lhs_MK, lhs_scale, rhs_GKN, rhs_scale, group_sizes_G, group_offset, transposed)
    chip = chip or current_chip()
    if chip is None:
        raise ValueError(
            "the current device is not a TPU, so there is no chip to tile for: pass chip=, set a mesh of TPU devices, or use "
            "grouped_matmul_fp8_reference."
        )
    dtype = jnp.dtype(preferred_element_type)
    (num_rows, depth), columns = lhs_MK.shape, rhs_GKN.shape[1 if transposed else 2]
    tiling = scaled_tiling(chip, num_rows, depth, columns, group_sizes_G.size, dtype.itemsize, transposed=transposed)
    return scaled_product(
        lhs_MK, lhs_scale, rhs_GKN, rhs_scale,
        group_sizes_G.astype(jnp.int32), jnp.asarray(0 if group_offset is None else group_offset, jnp.int32),
        transposed=transposed, dtype=dtype, tiling=tiling, interpret=interpret,
    )  # fmt: skip


def grouped_matmul_fp8_reference(
    lhs_MK: jax.Array,
    lhs_scale: jax.Array,
    rhs_GKN: jax.Array,
    rhs_scale: jax.Array,
    group_sizes_G: jax.Array,
    *,
    group_offset: int | jax.Array | None = None,
    transposed: bool = False,
    preferred_element_type: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """`grouped_matmul_fp8` by its definition: the numbers that the operands stand for, and every matrix times every row."""
    lhs_MK = dequantize(lhs_MK, lhs_scale, (1, BLOCK))
    rhs_GKN = dequantize(rhs_GKN, rhs_scale, (BLOCK, BLOCK))
    return grouped_matmul_reference(
        lhs_MK,
        rhs_GKN.swapaxes(1, 2) if transposed else rhs_GKN,
        group_sizes_G,
        group_offset=group_offset,
        preferred_element_type=jnp.dtype(preferred_element_type),
    )


def dequantize(values: jax.Array, scale: jax.Array, block: tuple[int, int]) -> jax.Array:
    """The numbers that values and scales of blocks stand for, exactly, in bfloat16."""
    for axis, size in zip((-2, -1), block, strict=True):
        scale = jnp.repeat(scale, size, axis)
    return (values.astype(jnp.float32) * scale).astype(jnp.bfloat16)


def _check(lhs_MK, lhs_scale, rhs_GKN, rhs_scale, group_sizes_G, group_offset, transposed: bool) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError or TypeError with what is wrong, what it is and what to do."""
    oriented = rhs_GKN
    if transposed and rhs_GKN.ndim == 3:
        oriented = jax.ShapeDtypeStruct((rhs_GKN.shape[0], rhs_GKN.shape[2], rhs_GKN.shape[1]), rhs_GKN.dtype)
    check_shapes(lhs_MK, oriented, group_sizes_G, group_offset)
    for name, values, scale, block in (("lhs", lhs_MK, lhs_scale, (1, BLOCK)), ("rhs", rhs_GKN, rhs_scale, (BLOCK, BLOCK))):
        if values.dtype != E4M3 or scale.dtype != jnp.float32:
            raise TypeError(
                f"{name} must be float8_e4m3fn with float32 scales, got {values.dtype} with {scale.dtype}; quantise it, or cast its scales."
            )
        wanted = (*values.shape[:-2], values.shape[-2] // block[0], values.shape[-1] // block[1])
        if scale.shape != wanted:
            raise ValueError(f"{name}_scale must have one scale per block of {block}, shape {wanted}, got {scale.shape}.")
        if not isinstance(scale, jax.core.Tracer):
            _check_scales(name, np.asarray(scale))


def _check_scales(name: str, scale: np.ndarray) -> None:
    good = (np.frexp(scale)[0] == 0.5) & (scale >= SCALES[0]) & (scale <= SCALES[1])
    if (bad := scale[~(good | np.isnan(scale))]).size:
        raise ValueError(
            f"{name}_scale must be powers of two from 2^-117 to 2^120, got {bad[0]!r} and {bad.size - 1} more that are not; quantise with "
            "power-of-two scales."
        )
