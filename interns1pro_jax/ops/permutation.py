"""The bijection between (token, slot) pairs and rows sorted by expert.

Every slot of every token has exactly one row, so the map is a permutation: both of its directions are gathers, and each is the
transpose of the other. Nothing here scatters activations, forward or backward.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.varying import match_varying
from pallas_kernels.chips import current_chip
from pallas_kernels.permutation import invert, permute, permute_reference
from pallas_kernels.routing_reference import CHUNK

# Name for rematerialisation policies: where rows lie, 12 bytes of each. To make it again takes as long as to move the rows themselves. The
# router's choices are made again: a tie that the second time is broken otherwise gives one token's gradient to the logit of its equal.
PLAN = "plan"


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


def make_plan(dest_NS: Int[Array, "N S"], group_sizes_G: Int[Array, " G"]) -> Plan:
    """The plan of known destinations, which must be a permutation of the rows. Its arrays have the name `PLAN`."""
    dest_M = dest_NS.reshape(-1)
    order_M = invert(dest_M) if current_chip() else permute_reference(jnp.arange(dest_M.size, dtype=jnp.int32), dest_M)
    return Plan(*(checkpoint_name(x, PLAN) for x in (dest_NS, order_M, group_sizes_G)))


def destinations(
    ids_TGC: Int[Array, "T G C"],
    ranks_TGC: Int[Array, "T G C"],
    counts_NE: Int[Array, "N E"],
    sizes_RE: Int[Array, "R E"],
    device: int | Int[Array, ""],
) -> Int[Array, "T G C"]:
    """Rows of one device's slots at the owners of their experts: the end of the counting sort that routing began.

    Each of R devices owns E/R experts. The slots that all the devices have for these are sorted by expert, then by device, token and
    choice.

    Args:
      ids_TGC, ranks_TGC, counts_NE: routing of the device's tokens (`pallas_kernels.routing_reference.Routes`).
      sizes_RE: slots that each device has for each expert.
      device: which of the R devices this is.
    """
    num_tokens, groups, chosen = ids_TGC.shape
    num_devices, num_experts = sizes_RE.shape
    size = num_experts // groups
    own_RE = sizes_RE.sum(0).reshape(num_devices, -1)
    experts_before_E = (jnp.cumsum(own_RE, 1) - own_RE).reshape(-1)
    devices_before_E = jnp.where(jnp.arange(num_devices)[:, None] < device, sizes_RE, 0).sum(0)
    chunks_before_NE = jnp.cumsum(counts_NE, 0) - counts_NE
    first_NGe = (experts_before_E + devices_before_E + chunks_before_NE).reshape(-1, groups, size)
    chunk = min(CHUNK, num_tokens)
    ids_NtGC = jnp.pad(ids_TGC, ((0, -num_tokens % chunk), (0, 0), (0, 0))).reshape(-1, chunk, groups, chosen)
    # A comparison instead of gathers, which are slow where they read single numbers.
    hot_NtGCe = ids_NtGC[..., None] == jnp.arange(size)
    first_NtGC = jnp.where(hot_NtGCe, first_NGe[:, None, :, None], 0).sum(-1)
    return first_NtGC.reshape(-1, groups, chosen)[:num_tokens] + ranks_TGC


def dispatch(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
    """A copy of each token in each of its rows: `x_ND[order // S]`."""
    return _dispatch(*match_varying(x_ND, plan.dest_NS, plan.order_M))


def combine(rows_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "N D"]:
    """The sum of each token's rows: `sum_s rows_MD[dest[:, s]]`. Transpose of `dispatch`."""
    return _combine(*match_varying(rows_MD, plan.dest_NS, plan.order_M))


def permute_slots(x_NS: Array, plan: Plan) -> Array:
    """Values (of 32 bits) of slots in the order of rows, [N, S] -> [M], with the name `PLAN`."""
    x_M, dest_M, order_M = match_varying(x_NS.reshape(-1), plan.dest_NS.reshape(-1), plan.order_M)
    return checkpoint_name(_permute(x_M, order_M, dest_M), PLAN)


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
    return permute(x_M, inverse_M) if current_chip() else _take(x_M, index_M)


_permute.defvjp(_with_indices(_permute), lambda indices, g_M: (_permute(g_M, *reversed(indices)), None, None))
