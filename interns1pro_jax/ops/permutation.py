"""The bijection between (token, slot) pairs and rows sorted by expert.

Every slot of every token has exactly one row, so the map is a permutation: both of its directions are gathers, and each is the
transpose of the other. Nothing here scatters activations, forward or backward.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.varying import match_varying


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """N*S (token, slot) pairs sorted by group; M = N*S rows.

    Attributes:
      dest_NS: row of each slot.
      order_M: flat slot (token * S + slot) of each row; the inverse of `dest_NS`.
      group_sizes_G: rows of each group. Rows of group g follow those of group g-1.
    """

    dest_NS: Int[Array, "N S"]
    order_M: Int[Array, " M"]
    group_sizes_G: Int[Array, " G"]


def make_plan(ids_NS: Int[Array, "N S"], num_groups: int) -> Plan:
    """Sorts the slots by their group id (0 <= id < num_groups), keeping the order of slots within a group.

    Id and slot are packed into one integer: the sort needs to carry nothing along, and what it yields is stable.

    Raises:
      ValueError: the packed integers would overflow.
    """
    num_slots = ids_NS.size
    if num_slots * num_groups > 2**32:
        raise ValueError(
            f"{num_slots} slots of {num_groups} groups cannot be sorted as 32-bit integers; split the tokens into chunks of at most "
            f"{2**32 // num_groups} slots."
        )
    slots = jnp.arange(num_slots, dtype=jnp.uint32)
    sorted_M = jnp.sort(ids_NS.reshape(-1).astype(jnp.uint32) * num_slots + slots)
    order_M = (sorted_M % num_slots).astype(jnp.int32)
    dest_M = jnp.zeros_like(order_M).at[order_M].set(slots.astype(jnp.int32), unique_indices=True)
    group_sizes_G = jnp.sum(ids_NS.reshape(-1, 1) == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    return Plan(dest_M.reshape(ids_NS.shape), order_M, group_sizes_G)


def dispatch(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
    """A copy of each token in each of its rows: `x_ND[order // S]`."""
    return _dispatch(*match_varying(x_ND, plan.dest_NS, plan.order_M))


def combine(rows_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "N D"]:
    """The sum of each token's rows: `sum_s rows_MD[dest[:, s]]`. Transpose of `dispatch`."""
    return _combine(*match_varying(rows_MD, plan.dest_NS, plan.order_M))


def permute_slots(x_NS: Array, plan: Plan) -> Array:
    """Values of slots in the order of rows, [N, S] -> [M]."""
    x_M, dest_M, order_M = match_varying(x_NS.reshape(-1), plan.dest_NS.reshape(-1), plan.order_M)
    return _permute(x_M, order_M, dest_M)


def unpermute_slots(x_M: Array, plan: Plan) -> Array:
    """Values of rows in the order of slots, [M] -> [N, S]. Inverse (and transpose) of `permute_slots`."""
    x_M, dest_M, order_M = match_varying(x_M, plan.dest_NS.reshape(-1), plan.order_M)
    return _permute(x_M, dest_M, order_M).reshape(plan.dest_NS.shape)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


@jax.custom_vjp
def _dispatch(x_ND: Array, dest_NS: Array, order_M: Array) -> Array:
    return _take(x_ND, order_M // dest_NS.shape[1])


@jax.custom_vjp
def _combine(rows_MD: Array, dest_NS: Array, order_M: Array) -> Array:
    # One gather and addition per slot: the [N, S, D] intermediate is never formed.
    total = _take(rows_MD, dest_NS[:, 0])
    for slot in range(1, dest_NS.shape[1]):
        total += _take(rows_MD, dest_NS[:, slot])
    return total


def _with_indices(function):  # type: ignore[no-untyped-def]
    return lambda x, *indices: (function(x, *indices), indices)


_dispatch.defvjp(_with_indices(_dispatch), lambda indices, g_MD: (_combine(g_MD, *indices), None, None))
_combine.defvjp(_with_indices(_combine), lambda indices, g_ND: (_dispatch(g_ND, *indices), None, None))


@jax.custom_vjp
def _permute(x_M: Array, index_M: Array, inverse_M: Array) -> Array:
    return _take(x_M, index_M)


_permute.defvjp(_with_indices(_permute), lambda indices, g_M: (_permute(g_M, *reversed(indices)), None, None))
