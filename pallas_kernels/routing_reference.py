"""Routing by its definition, in plain `jax.numpy`: what the kernels in `pallas_kernels.routing` equal, and the path of other platforms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

CHUNK = 128  # tokens among which ranks are counted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """Where tokens go, and the first half of a counting sort of their (token, slot) pairs by expert.

    The sort's second half is a sum: a slot's place is the number of slots of smaller experts, plus those of the same expert in
    earlier chunks (both from the counts), plus its rank.

    Attributes:
      ids_TGC: in-group ids of the chosen experts, largest logit first, equal logits in rising order (expert = group * e + id). A token
        whose probabilities are no numbers (a logit is NaN or infinite, or all are minus infinity) takes the first experts.
      probs_TGC: softmax over all experts, at the chosen ones. The gradient is that of a softmax of some temperature.
      ranks_TGC: slots of the same expert earlier in the same chunk of `CHUNK` tokens, by token and then by choice.
      counts_NE: slots of each expert in each chunk; the last chunk may have fewer tokens.
    """

    ids_TGC: jax.Array
    probs_TGC: jax.Array
    ranks_TGC: jax.Array
    counts_NE: jax.Array


def route_reference(
    logits_TE: jax.Array,
    replay_TGC: jax.Array | None = None,
    probe: jax.Array | None = None,
    *,
    groups: int,
    chosen: int,
    temperature: float = 1.0,
) -> Routes:
    """As `pallas_kernels.routing.route`, for any number of experts."""
    check_operands(logits_TE, replay_TGC, probe, groups, chosen, temperature)
    num_tokens, num_experts = logits_TE.shape
    size = num_experts // groups
    fixed_TE = jax.lax.stop_gradient(logits_TE)
    probs_TE = jax.nn.softmax(fixed_TE, -1)
    ids = top_ids(fixed_TE.reshape(num_tokens, groups, size), chosen)
    ids = jnp.where(jnp.isnan(probs_TE).any(-1)[:, None, None], jnp.arange(chosen), ids)
    if replay_TGC is not None:
        replay = replay_TGC.astype(jnp.int32)
        ids = jnp.where((replay >= 0) & (replay < size), replay, ids)
    # One comparison instead of gathers: its backward is a product, where that of a gather would be a scatter.
    hot_TGCe = ids[..., None] == jnp.arange(size)

    def at_ids(p_TE: jax.Array) -> jax.Array:
        return jnp.where(hot_TGCe, p_TE.reshape(num_tokens, groups, 1, size), 0.0).sum(-1)

    if probe is not None:
        logits_TE = observe_unselected(logits_TE, hot_TGCe.any(2).reshape(num_tokens, num_experts), probe)
    probs = straight_through(at_ids(probs_TE), at_ids(jax.nn.softmax(logits_TE / temperature, -1)))
    return Routes(ids, probs, *count_ranks(ids, size))


def check_operands(
    logits_TE: jax.Array, replay_TGC: jax.Array | None, probe: jax.Array | None, groups: int, chosen: int, temperature: float
) -> None:
    """Raises ValueError or TypeError with what is wrong, what it is and what to do."""
    if logits_TE.ndim != 2:
        raise ValueError(f"logits_TE must have rank 2, got shape {logits_TE.shape}; flatten the tokens.")
    if logits_TE.dtype != jnp.float32:
        raise TypeError(f"logits_TE must be float32, got {logits_TE.dtype}: a choice between rounded logits is another choice.")
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        raise ValueError("logits_TE has no tokens.")
    if groups < 1 or num_experts % groups:
        raise ValueError(f"{num_experts} experts do not divide into groups={groups}.")
    if not 1 <= chosen <= num_experts // groups:
        raise ValueError(f"chosen={chosen} must lie in 1..{num_experts // groups}, the experts of a group.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    if replay_TGC is not None:
        if replay_TGC.shape != (num_tokens, groups, chosen):
            raise ValueError(f"replay_TGC must have shape {(num_tokens, groups, chosen)} (tokens, groups, chosen), got {replay_TGC.shape}.")
        if not jnp.issubdtype(replay_TGC.dtype, jnp.integer):
            raise TypeError(f"replay_TGC must be integers, got {replay_TGC.dtype}.")
    if probe is not None and (probe.shape != () or probe.dtype != jnp.float32):
        raise ValueError(f"probe must be a float32 scalar, got {probe.dtype} of shape {probe.shape}.")


def count_ranks(ids_TGC: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Ranks and counts (see `Routes`) of given choices among groups of `size` experts."""
    num_tokens, groups, chosen = ids_TGC.shape
    hot_TGCe = ids_TGC[..., None] == jnp.arange(size)
    chunk = min(CHUNK, num_tokens)
    slots_TGe = jnp.pad(hot_TGCe.sum(2, dtype=jnp.int32), ((0, -num_tokens % chunk), (0, 0), (0, 0)))
    slots_NtGe = slots_TGe.reshape(-1, chunk, groups, size)
    upto_NtGe = jnp.cumsum(slots_NtGe, 1)
    before_TGe = (upto_NtGe - slots_NtGe).reshape(-1, groups, size)[:num_tokens]
    ranks_TGC = jnp.where(hot_TGCe, before_TGe[:, :, None], 0).sum(-1)
    # A token chooses an expert twice only where recorded routing has gaps.
    earlier_CC = jnp.tril(jnp.ones((chosen, chosen), bool), -1)
    ranks_TGC += ((ids_TGC[..., None] == ids_TGC[..., None, :]) & earlier_CC).sum(-1, dtype=jnp.int32)
    return ranks_TGC, upto_NtGe[:, -1].reshape(-1, groups * size)


def top_ids(scores: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest scores of the last axis, falling; equal scores in rising order of index."""
    if count == 1:  # the released model's case; an argmax is far cheaper than a sort
        return jnp.argmax(scores, -1, keepdims=True).astype(jnp.int32)
    return jax.lax.top_k(jnp.where(scores == 0, 0, scores), count)[1]  # where -0 would come after 0


@jax.custom_jvp
def straight_through(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value` in the forward, bit for bit; the derivative is that of `surrogate` (of the same shape)."""
    del surrogate
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return primals[0], tangents[1]


@jax.custom_vjp
def observe_unselected(logits: jax.Array, selected: jax.Array, probe: jax.Array) -> jax.Array:
    """The identity on `logits`. The gradient with respect to the scalar `probe` is the squared norm of the logits' gradient
    outside `selected`: how much the straight-through estimator teaches experts that were not run."""
    del selected, probe
    return logits


def _observe_fwd(logits, selected, probe):  # type: ignore[no-untyped-def]
    del probe
    return logits, selected


def _observe_bwd(selected, grad):  # type: ignore[no-untyped-def]
    return grad, None, jnp.sum(jnp.where(selected, 0.0, grad) ** 2)


observe_unselected.defvjp(_observe_fwd, _observe_bwd)
