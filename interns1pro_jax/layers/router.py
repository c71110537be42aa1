"""The grouped router: one softmax over all experts, a fixed number of winners in every contiguous group (spec 2.4).

Because each group sends the same number of rows for every token, a group placed on one device gives exactly balanced
devices, for every batch. The router is trained by a straight-through estimator: the forward uses the winners' (renormalised)
probabilities, the backward the dense softmax over all experts (paper section on the router; spec 1.2).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.parameter import normal, parameter
from interns1pro_jax.ops.projection import gathered, project
from interns1pro_jax.ops.varying import as_varying, varying_axes
from pallas_kernels.chips import current_chip
from pallas_kernels.routing import route, takes
from pallas_kernels.routing_reference import CHUNK, route_reference, straight_through

NOT_RECORDED = 255  # in recorded routing: this token's experts are not known; groups of more experts record in uint16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
      ids_BTGC: in-group ids of its experts, winners first (expert = group * experts_per_group + id).
      weights_BTGC: weights of their outputs.
      ranks_BTGC, counts_NE: the begun counting sort of a device's slots by expert, see `pallas_kernels.routing_reference.Routes`; the
        devices' chunks follow each other.
    """

    ids_BTGC: Int[Array, "B T G C"]
    weights_BTGC: Float[Array, "B T G C"]
    ranks_BTGC: Int[Array, "B T G C"]
    counts_NE: Int[Array, "N E"]

    @staticmethod
    def specs() -> Routing:
        """How its arrays are split over the mesh."""
        slots = sharding.spec("batch", "sequence", None, None)
        chunks = PartitionSpec(sharding.token_axes(), None)
        return Routing(slots, slots, slots, chunks)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over the valid (unpadded) tokens, in float32; the losses of `ops.router_losses` and the metrics read them.

    A router gives them for each row of the batch (with a leading axis B), so that no layer waits for the other devices;
    `over_rows` adds the rows up, once for all layers.

    Attributes:
      load_E: tokens sent to each expert.
      mass_E, mass_in_group_E: sum of the probabilities of each expert, from the softmax over all and over those of its group
        (differentiable).
      z, z_in_group: sum of logsumexp(logits)^2 over all experts, and of its mean over the groups (differentiable).
      entropy: sum of the entropies of the softmax over all experts, in nats.
      logit_max: largest absolute logit.
      tokens: number of valid tokens.
    """

    load_E: Float[Array, "*rows E"]
    mass_E: Float[Array, "*rows E"]
    mass_in_group_E: Float[Array, "*rows E"]
    z: Float[Array, "*rows"]
    z_in_group: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    logit_max: Float[Array, "*rows"]
    tokens: Float[Array, "*rows"]

    def over_rows(self, axis: int) -> RouterStats:
        """The statistics of all rows together; `axis` is that of the rows."""
        sums = jax.tree.map(lambda x: x.sum(axis), self)
        return dataclasses.replace(sums, logit_max=self.logit_max.max(axis))


class Router(nnx.Module):
    """Router of one MoE layer. Logits, softmax and weights are float32 whatever the model computes in (spec 9.4)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.hidden_size, config.num_experts)
        self.kernel_DE = parameter(rngs, normal(config.initializer_range), shape, ("embed", None), config.param_dtype)

    def gathered(self) -> Float[Array, "R D E"]:
        """Every device's copy of the matrix."""
        return gathered("router", self.kernel_DE[...], jnp.float32)

    def logits(self, x_BTD: Float[Array, "B T D"], kernel: Float[Array, "R D E"]) -> Float[Array, "B T E"]:
        return project("btd,de->bte", x_BTD, kernel, float32=True)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        kernel: Float[Array, "R D E"] | None = None,
        valid_BT: Bool[Array, "B T"],
        replay_BTGC: Int[Array, "B T G C"] | None = None,
        probe_R: Float[Array, " R"] | None = None,
    ) -> tuple[Routing, RouterStats, Float[Array, "B T E"]]:
        """Routes tokens.

        Args:
          x_BTD: input of the MoE layer.
          kernel: `gathered`, where several calls share it.
          valid_BT: tokens that count in the statistics (padding is routed, but not counted).
          replay_BTGC: recorded in-group ids to use instead of the winners; weights and gradients are taken at these ids. An id
            that is no expert of a group (`NOT_RECORDED`) leaves the choice to the router.
          probe_R: zeros of `probes`, whose gradient is what `observe_unselected` says of the tokens of each device.

        Returns:
          routing, statistics, and the logits.
        """
        cfg = self.config
        logits = self.logits(x_BTD, self.gathered() if kernel is None else kernel)
        estimated = cfg.router.straight_through
        routing = route_tokens(
            logits,
            replay_BTGC,
            probe_R if estimated else None,
            groups=cfg.router_n_groups,
            chosen=cfg.experts_per_group_per_token,
            temperature=cfg.router.temperature if estimated else 1.0,
        )
        probs = routing.weights_BTGC
        weights = probs / (probs.sum((-2, -1), keepdims=True) + 1e-20) if cfg.norm_topk_prob else probs
        if estimated:
            weights = straight_through(jax.lax.stop_gradient(weights), probs)
        return dataclasses.replace(routing, weights_BTGC=weights), _stats(logits, routing.ids_BTGC, valid_BT), logits


def probes(layers: int) -> Float[Array, "L R"]:
    """Zeros, one for each layer and device that routes tokens, split over these: what is seen through them is summed after all layers,
    where no layer waits for it."""
    return jnp.zeros(
        (layers, sharding.axis_size(*sharding.token_axes())), jnp.float32, out_sharding=PartitionSpec(None, sharding.token_axes())
    )


def route_tokens(
    logits_BTE: Float[Array, "B T E"],
    replay_BTGC: Int[Array, "B T G C"] | None = None,
    probe_R: Float[Array, " R"] | None = None,
    *,
    groups: int,
    chosen: int,
    temperature: float = 1.0,
) -> Routing:
    """Each device routes its own tokens; the weights are probabilities. Arguments as in `pallas_kernels.routing.route`,
    with a `probe` for each device."""
    specs = Routing.specs()
    if replay_BTGC is not None:
        replay_BTGC = sharding.constrain(replay_BTGC, "batch", "sequence", None, None)
    return jax.shard_map(
        partial(_local_route, groups=groups, chosen=chosen, temperature=temperature),
        in_specs=(sharding.spec("batch", "sequence", None), specs.ids_BTGC, PartitionSpec(sharding.token_axes())),
        out_specs=specs,
    )(sharding.constrain(logits_BTE, "batch", "sequence", None), replay_BTGC, probe_R)


def _local_route(logits_BTE, replay_BTGC, probe_R, **options):
    batch = logits_BTE.shape[:2]
    axes = varying_axes(logits_BTE)
    # Rows of whole chunks are routed each by itself: the router's product makes them with tokens last, row by row, and to join them there
    # XLA would lay them out anew twice.
    rows = batch[0] if batch[1] % CHUNK == 0 else 1
    logits, replay = jax.tree.map(lambda x: as_varying(x.reshape(rows, -1, *x.shape[2:]), axes), (logits_BTE, replay_BTGC))
    probe = None if probe_R is None else probe_R.reshape(())
    by_kernel = current_chip() and takes(logits.shape[-1], options["groups"])
    function = route if by_kernel else route_reference
    routes = jax.vmap(lambda logits_TE, replay_TGC: function(logits_TE, replay_TGC, probe, **options))(logits, replay)
    ids, probs, ranks = (x.reshape(*batch, *x.shape[2:]) for x in (routes.ids_TGC, routes.probs_TGC, routes.ranks_TGC))
    return Routing(ids, probs, ranks, routes.counts_NE.reshape(-1, logits.shape[-1]))


def _stats(logits: jax.Array, ids: jax.Array, valid: jax.Array) -> RouterStats:
    mask = valid[..., None].astype(jnp.float32)
    size = logits.shape[-1] // ids.shape[-2]
    # Reshapes say where their results live: with one token per row or one group it could not be told from the shapes.
    split = sharding.spec("batch", "sequence", None)
    selected = (ids[..., None] == jnp.arange(size)).any(-2).reshape(logits.shape, out_sharding=split)
    logits_BTGe = logits.reshape(*ids.shape[:-1], size, out_sharding=sharding.spec("batch", "sequence", None, None))
    probs = jax.nn.softmax(logits, -1)
    probs_in_group = jax.nn.softmax(logits_BTGe, -1).reshape(logits.shape, out_sharding=split)
    log_z, log_z_BTG = jax.nn.logsumexp(logits, -1), jax.nn.logsumexp(logits_BTGe, -1)
    entropy = jax.lax.stop_gradient(log_z - (probs * logits).sum(-1))
    return RouterStats(
        load_E=(selected * mask).sum(1),
        mass_E=(probs * mask).sum(1),
        mass_in_group_E=(probs_in_group * mask).sum(1),
        z=(log_z**2 * mask[..., 0]).sum(1),
        z_in_group=((log_z_BTG**2).mean(-1) * mask[..., 0]).sum(1),
        entropy=(entropy * mask[..., 0]).sum(1),
        logit_max=jnp.max(jnp.abs(jax.lax.stop_gradient(logits)) * mask, (1, 2)),
        tokens=mask.sum((1, 2)),
    )
