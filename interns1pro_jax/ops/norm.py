"""Normalisations, with fp32 statistics whatever the dtype of the activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*dims D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*dims D"]:
    """`x / rms(x) * weight` over the last axis (spec 2.1): cast back to x's dtype first, then multiplied by the weight."""
    x_fp32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_fp32), axis=-1, keepdims=True) + eps)
    return (x_fp32 * scale).astype(x.dtype) * weight.astype(x.dtype)


def layer_norm(x: Float[Array, "*dims D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float) -> Float[Array, "*dims D"]:
    """LayerNorm over the last axis, wholly in fp32, cast back to x's dtype at the end (as PyTorch's kernel does)."""
    x_fp32 = x.astype(jnp.float32)
    centred = x_fp32 - jnp.mean(x_fp32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + eps)
    return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
