"""Which of two independent computations comes first, where XLA's own choice costs time.

On TPUs whose SparseCores run the collectives, these end in the order in which they began: what is needed soon must not begin behind what
takes long. `jax.lax.optimization_barrier` is gone when XLA orders instructions; a real dependency is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def after(numbers: jax.Array, first: jax.Array) -> jax.Array:
    """`numbers` (integers, unchanged), which are not there before `first` is. Inside `jax.shard_map` or on one device."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(first).reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return numbers + (bits * (bits + 1) % 2).astype(numbers.dtype)  # one of two successive numbers is even, which XLA does not know
