"""The grouped router: one softmax over all experts, a fixed number of winners in every contiguous group (spec 2.4).

Because each group sends the same number of rows for every token, a group placed on one device gives exactly balanced
devices, for every batch. The router is trained by a straight-through estimator: the forward uses the winners' (renormalised)
probabilities, the backward the dense softmax over all experts (paper section on the router; spec 1.2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.parameter import normal, parameter

NOT_RECORDED = 255  # in recorded routing: this token's experts are not known; groups of more experts record in uint16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes: in-group expert ids (expert = group * experts_per_group + id) and weights, winners first."""

    ids_BTGC: Int[Array, "B T G C"]
    weights_BTGC: Float[Array, "B T G C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over the valid (unpadded) tokens, in float32; the losses of `ops.router_losses` and the metrics read them.

    A router gives them for each row of the batch (with a leading axis B), so that no layer waits for the other devices;
    `over_rows` adds the rows up, once for all layers.

    Attributes:
      load_E: tokens sent to each expert.
      mass_E: sum of the routing probabilities of each expert (differentiable).
      z: sum of logsumexp(logits)^2 (differentiable).
      entropy: sum of the entropies of the softmax over all experts, in nats.
      logit_max: largest absolute logit.
      tokens: number of valid tokens.
    """

    load_E: Float[Array, "*rows E"]
    mass_E: Float[Array, "*rows E"]
    z: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    logit_max: Float[Array, "*rows"]
    tokens: Float[Array, "*rows"]

    def over_rows(self, axis: int) -> RouterStats:
        """The statistics of all rows together; `axis` is that of the rows."""
        sums = jax.tree.map(lambda x: x.sum(axis), self)
        return dataclasses.replace(sums, logit_max=self.logit_max.max(axis))


@jax.custom_jvp
def straight_through(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value` in the forward, bit for bit; the derivative is that of `surrogate` (of the same shape)."""
    del surrogate
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[0], tangents[1]


@jax.custom_vjp
def observe_unselected(logits: jax.Array, selected: jax.Array, probe: jax.Array) -> jax.Array:
    """The identity on `logits`. The gradient with respect to the scalar `probe` is the squared norm of the logits' gradient
    outside `selected`: how much the straight-through estimator teaches experts that were not run."""
    del selected, probe
    return logits


def _observe_fwd(logits, selected, probe):
    del probe
    return logits, selected


def _observe_bwd(selected, grad):
    return grad, None, jnp.sum(jnp.where(selected, 0.0, grad) ** 2)


observe_unselected.defvjp(_observe_fwd, _observe_bwd)


class Router(nnx.Module):
    """Router of one MoE layer. Logits, softmax and weights are float32 whatever the model computes in (spec 9.4)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.hidden_size, config.num_experts)
        self.kernel_DE = parameter(rngs, normal(config.initializer_range), shape, ("embed", None), config.param_dtype)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        kernel = self.kernel_DE[...].astype(jnp.float32)
        return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        valid_BT: Bool[Array, "B T"],
        replay_BTGC: Int[Array, "B T G C"] | None = None,
        probe: Float[Array, ""] | None = None,
    ) -> tuple[Routing, RouterStats, Float[Array, "B T E"]]:
        """Routes tokens.

        Args:
          x_BTD: input of the MoE layer.
          valid_BT: tokens that count in the statistics (padding is routed, but not counted).
          replay_BTGC: recorded in-group ids to use instead of the winners; weights and gradients are taken at these ids. An id
            that is no expert of a group (`NOT_RECORDED`) leaves the choice to the router.
          probe: see `observe_unselected`.

        Returns:
          routing, statistics, and the logits.
        """
        cfg = self.config
        groups, size, chosen = cfg.router_n_groups, cfg.experts_per_group, cfg.experts_per_group_per_token
        logits = self.logits(x_BTD)
        batch = logits.shape[:2]
        # The reshapes say where their result lives: with one token per row or one group it could not be told from the shapes.
        spec = sharding.spec("batch", "sequence", None, None)
        ids = top_ids(jax.lax.stop_gradient(logits).reshape(*batch, groups, size, out_sharding=spec), chosen)
        if replay_BTGC is not None:
            replay = sharding.constrain(replay_BTGC, "batch", "sequence", None, None).astype(jnp.int32)
            ids = jnp.where(replay < size, replay, ids)
        # One comparison instead of gathers: its backward is a product, where that of a gather would be a scatter.
        hot_BTGCe = ids[..., None] == jnp.arange(size)
        selected_BTE = hot_BTGCe.any(-2).reshape(*batch, groups * size, out_sharding=sharding.spec("batch", "sequence", None))

        def at_ids(p_BTE: jax.Array) -> jax.Array:
            return jnp.where(hot_BTGCe, p_BTE.reshape(*batch, groups, size, out_sharding=spec)[..., None, :], 0.0).sum(-1)

        probs = jax.nn.softmax(logits, -1)
        weights = at_ids(probs)
        if cfg.norm_topk_prob:
            weights = weights / (weights.sum((-2, -1), keepdims=True) + 1e-20)
        if cfg.router.straight_through:
            observed = logits if probe is None else observe_unselected(logits, selected_BTE, probe)
            weights = straight_through(jax.lax.stop_gradient(weights), at_ids(jax.nn.softmax(observed / cfg.router.temperature, -1)))
        return Routing(ids, weights), _stats(logits, probs, selected_BTE, valid_BT), logits


def top_ids(scores: Float[Array, "... e"], count: int) -> Int[Array, "... count"]:
    """Indices of the `count` largest scores, falling; equal scores in rising order of index."""
    if count == 1:  # the released model's case; an argmax is far cheaper than a sort
        return jnp.argmax(scores, -1, keepdims=True).astype(jnp.int32)
    return jax.lax.top_k(scores, count)[1]


def _stats(logits: jax.Array, probs: jax.Array, selected: jax.Array, valid: jax.Array) -> RouterStats:
    mask = valid[..., None].astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    entropy = jax.lax.stop_gradient(log_z - (probs * logits).sum(-1))
    return RouterStats(
        load_E=(selected * mask).sum(1),
        mass_E=(probs * mask).sum(1),
        z=(log_z**2 * mask[..., 0]).sum(1),
        entropy=(entropy * mask[..., 0]).sum(1),
        logit_max=jnp.max(jnp.abs(jax.lax.stop_gradient(logits)) * mask, (1, 2)),
        tokens=mask.sum((1, 2)),
    )
