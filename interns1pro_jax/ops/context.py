"""Where the tokens of a row lie when several devices share it (the mesh axis `context`).

Were the row cut in reading order, the last device would have most of a causal layer's work: its queries have all keys before them.
So n devices cut it into 2n chunks, and device r holds chunks r and 2n-1-r. Any such pair has the same number of keys before it:

    n = 2      reading order   0 1 | 2 3       balanced   0 3 | 1 2

Inside the decoder a row is balanced; before and behind it, it is in reading order. Both exchanges move a token's activations once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError

AXIS = "context"


def balance(x: Array, axis: int = 1) -> Array:
    """Moves the tokens of rows that are split over `context` from reading order to the balanced one.

    Raises:
      ConfigError: the row does not divide into two chunks for each device.
    """
    return _moved(x, axis, back=False)


def reading_order(x: Array, axis: int = 1) -> Array:
    """The inverse of `balance`."""
    return _moved(x, axis, back=True)


def _moved(x: Array, axis: int, *, back: bool) -> Array:
    ranks, length = sharding.axis_size(AXIS), x.shape[axis]
    if ranks == 1:
        return x
    if length % (2 * ranks):
        raise ConfigError(
            f"rows of {length} tokens do not divide into {2 * ranks} chunks, two for each device of the mesh axis {AXIS}={ranks}; choose "
            f"a row length divisible by {2 * ranks} or another mesh."
        )
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(partial(_exchange, axis=axis, ranks=ranks, back=back), in_specs=spec, out_specs=spec)(x)


def _exchange(x: Array, *, axis: int, ranks: int, back: bool) -> Array:
    # In reading order device r has the even chunk 2r and the odd chunk 2r+1; each goes to another device than any other even (odd) one.
    routes = [[(rank, min(chunk, 2 * ranks - 1 - chunk)) for rank, chunk in enumerate(range(odd, 2 * ranks, 2))] for odd in (0, 1)]
    low_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    first, second = jnp.split(x, 2, axis)
    with jax.named_scope("sequence_exchange"):
        if back:
            even, odd = jnp.where(low_is_even, first, second), jnp.where(low_is_even, second, first)
            there = [[(to, source) for source, to in route] for route in routes]
            return jnp.concatenate([jax.lax.ppermute(part, AXIS, route) for part, route in zip((even, odd), there, strict=True)], axis)
        even, odd = (jax.lax.ppermute(part, AXIS, route) for part, route in zip((first, second), routes, strict=True))
        return jnp.concatenate([jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)], axis)


def own_indices(length: int) -> Int[Array, " T"]:
    """Inside `jax.shard_map`: where this device's tokens, `length` of each row, stand in the row."""
    rank, ranks, chunk = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS), length // 2
    return jnp.concatenate([rank * chunk + jnp.arange(chunk), (2 * ranks - 1 - rank) * chunk + jnp.arange(chunk)])


def all_gather(x: Array, axis: int = 1) -> Array:
    """Inside `jax.shard_map`: whole rows in reading order, of rows that are balanced."""
    x = jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)
    shape = x.shape
    x = x.reshape(*shape[:axis], jax.lax.axis_size(AXIS), 2, -1, *shape[axis + 1 :])
    low, high = (jax.lax.index_in_dim(x, half, axis + 1, keepdims=False) for half in (0, 1))
    return jnp.concatenate([low, jnp.flip(high, axis)], axis).reshape(shape)
