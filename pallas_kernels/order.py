"""Which of two independent computations comes first, where XLA's own choice costs time.

On TPUs whose SparseCores run the collectives, these end in the order in which they began: what is needed soon must not begin behind what
takes long. `jax.lax.optimization_barrier` is gone when XLA orders instructions; a real dependency is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def after(numbers: jax.Array, first: jax.Array) -> jax.Array:
    """`numbers` (integers, unchanged), which are not there before `first` is. Inside `jax.shard_map` or on one device."""
    return numbers + _zero(first).astype(numbers.dtype)


@jax.custom_vjp
def all_after(x: jax.Array, *first: jax.Array) -> jax.Array:
    """As `after` all of `first`, for an array of any dtype that nobody else reads: one of its numbers is written again, in its place.
    Gradients pass as if there were no order."""
    if not first:
        return x
    corner = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
    return jax.lax.dynamic_update_slice(x, corner * sum(map(_zero, first), start=jnp.int32(1)).astype(x.dtype), (0,) * x.ndim)


all_after.defvjp(lambda x, *first: (all_after(x, *first), (None,) * len(first)), lambda nothing, gradient: (gradient, *nothing))


def _zero(first: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(first).reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return bits * (bits + 1) % 2  # one of two successive numbers is even, which XLA does not know
