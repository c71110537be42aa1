"""Fourier position encoding (FoPE) and the plain rotary encoding it grows from, spec 2.3."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import TextConfig

# The released model's frequencies come from a float32 power that is one unit in the last place off at these indices; at
# position 262143 that unit moves the phase by 0.016 rad, so the released value is kept: {(theta, head_dim): {index: value}}.
_RELEASED_ROUNDING: dict[tuple[float, int], dict[int, str]] = {(5e6, 128): {19: "0x1.504622p-7"}}


def inverse_frequencies(theta: float, width: int) -> np.ndarray:
    """`1 / theta^(2i/width)` for i = 0 .. width/2-1 in float32, bit-equal to the released model's (power, then division)."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1) / np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    for index, value in _RELEASED_ROUNDING.get((float(theta), width), {}).items():
        frequencies[index] = float.fromhex(value)
    return frequencies


def text_frequencies(config: TextConfig) -> np.ndarray:
    """The frequencies that the text decoder keeps, [n] float32, falling (spec 2.3).

    With Fourier encoding, those whose period is shorter than `max_position_embeddings`, or the first `num_inv_freq`.
    """
    frequencies = inverse_frequencies(config.rope_theta, config.head_dim)
    if config.fope is None:
        return frequencies
    if config.fope.num_inv_freq is not None:
        return frequencies[: config.fope.num_inv_freq]
    return frequencies[frequencies > 2 * math.pi / config.max_position_embeddings]


def initial_coefficients(key: jax.Array, shape: tuple[int, ...], gain: float) -> Float[Array, "*heads n n"]:
    """Identity plus Xavier-normal noise, with the fan rule of a [heads, n, n] or [n, n] tensor (spec 2.3)."""
    n = shape[-1]
    fan_in, fan_out = (n * n, shape[0] * n) if len(shape) == 3 else (n, n)
    return jnp.eye(n) + gain * math.sqrt(2 / (fan_in + fan_out)) * jax.random.normal(key, shape)


def rotary_tables(
    positions_BT: Int[Array, "B T"],
    frequencies: np.ndarray,
    head_dim: int,
    sin_coef: Float[Array, "*heads n n"] | None = None,
    cos_coef: Float[Array, "*heads n n"] | None = None,
) -> tuple[Float[Array, "B T heads H"], Float[Array, "B T heads H"]]:
    """cos and sin tables in float32, in the half-split layout; `heads` is the coefficients' head count, or 1.

    With coefficients, the sines (cosines) of the kept frequencies are mixed by a matrix whose *first* axis is contracted.
    Frequencies that were not kept get sin = cos = 1: a position-free mix of their pair. The weights were trained so (spec 9.1).
    """
    phase = positions_BT[..., None].astype(jnp.float32) * frequencies

    def mix(table: jax.Array, coef: jax.Array | None) -> jax.Array:
        if coef is None:
            return table[:, :, None, :]
        coef = coef.astype(jnp.float32).reshape(-1, *coef.shape[-2:])
        return jnp.einsum("btn,knm->btkm", table, coef, precision=jax.lax.Precision.HIGHEST)

    def widen(table: jax.Array) -> jax.Array:
        padded = jnp.pad(table, [(0, 0)] * 3 + [(0, head_dim // 2 - table.shape[-1])], constant_values=1.0)
        return jnp.concatenate([padded, padded], -1)

    return widen(mix(jnp.cos(phase), cos_coef)), widen(mix(jnp.sin(phase), sin_coef))


def _quarter_turn(width: int, dtype: jnp.dtype) -> Array:
    """The matrix that takes `[first, second]` to `[-second, first]`."""
    half = np.eye(width // 2)
    return jnp.asarray(np.block([[np.zeros_like(half), half], [-half, np.zeros_like(half)]]), dtype)


def apply_rotary(
    x_BTQH: Float[Array, "B T Q H"], cos: Float[Array, "B T heads H"], sin: Float[Array, "B T heads H"]
) -> Float[Array, "B T Q H"]:
    """`x*cos + rot(x)*sin` in x's dtype; head i of x uses table row `i // (Q / heads)`."""
    b, t, q, h = x_BTQH.shape
    heads = cos.shape[2]
    grouped = x_BTQH.reshape(b, t, heads, q // heads, h)
    # By a product, exact since every result has one term: TPUs join halves of a vector register far more slowly.
    rotated = jnp.einsum("btkrh,hi->btkri", grouped, _quarter_turn(h, x_BTQH.dtype), precision=jax.lax.Precision.HIGHEST)
    cos, sin = (table.astype(x_BTQH.dtype)[:, :, :, None, :] for table in (cos, sin))
    return (grouped * cos + rotated * sin).reshape(b, t, q, h)
