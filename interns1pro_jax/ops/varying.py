"""Types of values inside `jax.shard_map`: over which mesh axes they vary from device to device."""

from __future__ import annotations

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies; empty outside `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x`, typed as varying over at least `axes`. Its transpose sums over the axes that were added."""
    missing = axes - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All arrays typed as varying over the union of their axes, so that they may share a loop carry or a custom gradient."""
    axes = varying_axes(*arrays)
    return tuple(as_varying(x, axes) for x in arrays)
