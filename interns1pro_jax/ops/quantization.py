"""Block quantisation to FP8 (e4m3 values, power-of-two scales), spec section 7.

A matrix is cut into blocks (128 x 128 for weights, 1 x 128 for activations; edge blocks may be partial) and each block shares one
scale: `value = e4m3 * scale`. Scales are powers of two ("ue8m0") of at least 2^-117, so a dequantised value is exact in bfloat16.
What is not finite is kept in the scale: the scale of a block with such an element is NaN, and so is all that the block stands for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

WEIGHT_BLOCK = (128, 128)
E4M3_MAX = 448.0  # 1.75 * 2^8
LEAST_SCALE = 2.0**-117  # times the least e4m3 number, 2^-9, it is the least normal number of bfloat16
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def quantize_blocks(
    values: Float[Array, "*lead R C"],
    block: tuple[int, int] = WEIGHT_BLOCK,
    min_amax: float = 0.0,
    keep: Float[Array, "*lead r c"] | None = None,
) -> tuple[Float[Array, "*lead R C"], Float[Array, "*lead r c"]]:
    """Rounds to e4m3 with the scale `2^ceil(log2(amax / 448))` of each block, amax being its largest magnitude.

    Args:
      block: rows and columns of a block.
      min_amax: lower bound of amax. A block of zeros has the scale 1 where the bound is 0.
      keep: scales that blocks had before. A block that its own one represents exactly keeps it: rounding may have made the largest
        magnitude smaller than the one that the scale was chosen for.

    Returns:
      float8_e4m3fn values of the same shape, and float32 scales [..., ceil(R / rows), ceil(C / columns)].
    """
    shape = (values.shape[-2], values.shape[-1])
    rows, columns = (-(-size // step) for size, step in zip(shape, block, strict=True))
    padding = [(0, count * step - size) for count, step, size in zip((rows, columns), block, shape, strict=True)]
    magnitude = jnp.abs(values.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)  # a maximum on CPU may pass over NaN
    magnitude = jnp.pad(magnitude, [(0, 0)] * (values.ndim - 2) + padding)
    amax = magnitude.reshape(*values.shape[:-2], rows, block[0], columns, block[1]).max((-3, -1))
    scale = _power_of_two_scale(jnp.maximum(amax, min_amax))
    if keep is not None:
        factor = _expand(jnp.where(keep > 0, keep, 1).astype(jnp.float32), block, shape)
        quotient = values.astype(jnp.float32) / factor
        lost = (jnp.abs(quotient) > E4M3_MAX) | (round_to_e4m3(quotient) * factor != values.astype(jnp.float32))
        lost = jnp.pad(lost, [(0, 0)] * (values.ndim - 2) + padding)
        is_lossy = lost.reshape(*values.shape[:-2], rows, block[0], columns, block[1]).any((-3, -1))
        scale = jnp.where(is_lossy | ~(keep > 0), scale, keep.astype(jnp.float32))
    quotient = values.astype(jnp.float32) / _expand(scale, block, shape)
    return round_to_e4m3(quotient).astype(jnp.float8_e4m3fn), scale


def round_to_e4m3(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32 rounded to the nearest number of e4m3 (to even), of magnitudes up to 448, as float32.

    A conversion there and back would do, but XLA may leave out both (`xla_allow_excess_precision`); on GPUs it does. This it may not, and
    a conversion of what is e4m3 already changes nothing.
    """
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=3)  # with room for the exponents of 256 to 448
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 2.0**9) * 2.0**-9, normal)


def dequantize_blocks(
    values: Float[Array, "*lead R C"],
    scale: Float[Array, "*lead r c"],
    block: tuple[int, int] = WEIGHT_BLOCK,
    dtype: str | jnp.dtype = jnp.float32,
) -> Float[Array, "*lead R C"]:
    """`values * scale` block by block, multiplied in float32 and rounded once to `dtype`."""
    factor = _expand(scale.astype(jnp.float32), block, (values.shape[-2], values.shape[-1]))
    return (values.astype(jnp.float32) * factor).astype(dtype)


def quantize_activations(
    x: Float[Array, "*lead C"], width: int = 128, min_amax: float = 1e-6
) -> tuple[Float[Array, "*lead C"], Float[Array, "*lead c"]]:
    """Dynamic quantisation of the input of a quantised matrix: one scale per token and `width` channels, amax at least `min_amax`.

    Returns:
      float8_e4m3fn values and float32 scales; `dequantize_activations` gives the rounded input back.
    """
    values, scale = quantize_blocks(x[..., None, :], (1, width), min_amax)
    return values[..., 0, :], scale[..., 0, :]


def dequantize_activations(
    values: Float[Array, "*lead C"], scale: Float[Array, "*lead c"], width: int = 128, dtype: str | jnp.dtype = jnp.float32
) -> Float[Array, "*lead C"]:
    """The inverse of `quantize_activations`, up to its rounding."""
    return dequantize_blocks(values[..., None, :], scale[..., None, :], (1, width), dtype)[..., 0, :]


def dequantize_box(values: np.ndarray, scale: np.ndarray, first: tuple[int, int], block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """`dequantize_blocks` on the host, for a box cut out of a larger matrix.

    Args:
      values: the box, [..., R, C] in float8_e4m3fn.
      scale: scales of the blocks that the box touches, [..., r, c].
      first: row and column of the box's first element within the first of these blocks.
      block: rows and columns of a block.
    """
    result = np.empty(values.shape, dtype)
    columns = (first[1] + np.arange(values.shape[-1])) // block[1]
    for row in range(scale.shape[-2]):  # one row of blocks at a time bounds the float32 intermediates
        part = slice(max(row * block[0] - first[0], 0), (row + 1) * block[0] - first[0])
        factor = scale[..., row, None, :].astype(np.float32)[..., columns]
        result[..., part, :] = _E4M3_VALUES[values[..., part, :].view(np.uint8)] * factor
    return result


def _power_of_two_scale(amax: jax.Array) -> jax.Array:
    """The least power of two s from LEAST_SCALE on with `amax <= 448 * s`, exactly; 1 for zero, NaN for what is not finite."""
    mantissa, exponent = jnp.frexp(amax)  # amax = mantissa * 2^exponent with mantissa in [0.5, 1), and 448 = 0.875 * 2^9
    power = jnp.where(mantissa <= 0.875, exponent - 9, exponent - 8)
    scale = jnp.where(amax > 0, jnp.maximum(jnp.ldexp(jnp.float32(1), power), LEAST_SCALE), jnp.float32(1))
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def _expand(scale: jax.Array, block: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """Repeats the scale of each block over its elements: [..., r, c] to [..., *shape]."""
    rows = jnp.repeat(scale, block[0], axis=-2)[..., : shape[0], :]
    return jnp.repeat(rows, block[1], axis=-1)[..., : shape[1]]
