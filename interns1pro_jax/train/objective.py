"""The objective of training: cross entropy over text tokens, and the router's losses; and what a batch adds up to.

Every term is a sum over tokens, divided by what the whole batch has of them. So the objectives of the parts of a batch add up to that of
the batch, and neither the mesh nor packing nor accumulation changes it beyond rounding.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import ConfigError, RouterConfig, TextConfig
from interns1pro_jax.layers.router import RouterStats
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.losses import AVERAGING, cross_entropy, label_weights, ordered_sums
from interns1pro_jax.ops.router_losses import balance_loss, z_loss

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, beside the router's losses (`config.RouterConfig`).

    Attributes:
      averaging: how documents of different lengths count (`ops.losses.AVERAGING`): by their labels (`token`), the same (`sample`), or
        by the square root of their labels (`square`, the weights of the Intern-S1 report).
    """

    averaging: str = "token"

    def __post_init__(self) -> None:
        if self.averaging not in AVERAGING:
            raise ConfigError(f"Objective.averaging={self.averaging!r} is unknown; use one of {', '.join(AVERAGING)}.")


MEAN_OVER_TOKENS = Objective()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the losses of a whole batch are means over.

    Attributes:
      weight: sum of the weights of its labels.
      tokens: its tokens that are not padding.
      load_LE: assignments of each expert, where a part of the batch cannot count them all (`RouterConfig.balance_over`).
    """

    weight: Float[Array, ""]
    tokens: Float[Array, ""]
    load_LE: Float[Array, "L E"] | None = None

    @staticmethod
    def of(batch: Batch, objective: Objective = MEAN_OVER_TOKENS) -> Counts:
        weights_BT = label_weights(batch.labels, batch.inputs.segment_ids, objective.averaging)
        return Counts(ordered_sums(weights_BT), jnp.sum(batch.inputs.segment_ids > 0, dtype=jnp.int32).astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a batch, or a part of one, adds up to: its share of the mean loss (nats per label), its labels, and the router's statistics of
    every MoE layer."""

    loss: Float[Array, ""]
    labels: Int[Array, ""]
    stats: RouterStats | None


def loss_function(
    model: InternS1Pro,
    batch: Batch,
    counts: Counts | None = None,
    probe_LR: Float[Array, "L R"] | None = None,
    *,
    objective: Objective = MEAN_OVER_TOKENS,
    remat: str = "none",
    moe_chunks: int = 1,
) -> tuple[Float[Array, ""], Sums]:
    """Mean loss over the labels plus the router's auxiliary losses: the objective of training.

    Args:
      counts: those of the whole batch where `batch` is a part of it; the values of the parts then add up to that of the whole.
      probe_LR, remat, moe_chunks: as in `TextModel`.
    """
    text = model.config.text
    out = model(batch.inputs, probe_LR=probe_LR, remat=remat, moe_chunks=moe_chunks)
    weights_BT = label_weights(batch.labels, batch.inputs.segment_ids, objective.averaging)
    total, labels = cross_entropy(out.hidden_BTD, model.text.head_DV, batch.labels, weights_BT)
    counts = Counts.of(batch, objective) if counts is None else counts
    loss = total / jnp.where(counts.weight > 0, counts.weight, 1)
    if out.stats is None:
        return loss, Sums(loss, labels, None)
    return loss + auxiliary_loss(text, out.stats, counts), Sums(loss, labels, out.stats.over_rows(1))


def auxiliary_loss(config: TextConfig, stats: RouterStats, counts: Counts) -> Float[Array, ""]:
    """Balancing and z-losses of all MoE layers, weighted; `stats` [L, B, ...] are those of the rows, `counts` of the whole batch."""
    router, groups, all_rows = config.router, config.router_n_groups, stats.over_rows(1)

    def balance(mass: str, groups: int) -> Array:
        if router.balance_over == "row":
            by_row = jax.vmap(lambda load, mass, tokens: balance_loss(load, mass, tokens, groups), in_axes=(1, 1, 0))
            mean_B = by_row(stats.load_E, getattr(stats, mass), stats.tokens[0])
            return jnp.sum(mean_B * stats.tokens[0]) / jnp.maximum(counts.tokens, 1)
        load_LE = all_rows.load_E if counts.load_LE is None else counts.load_LE
        return balance_loss(load_LE, getattr(all_rows, mass), counts.tokens, groups)

    return (
        router.balance_coef * balance("mass_E", 1)
        + router.balance_in_group_coef * balance("mass_in_group_E", groups)
        + router.z_coef * z_loss(all_rows.z, counts.tokens)
        + router.z_in_group_coef * z_loss(all_rows.z_in_group, counts.tokens)
    )


def counts_beforehand(router: RouterConfig) -> bool:
    """Whether the parts of an accumulated batch need the loads of the whole batch."""
    return router.balance_over == "batch" and (router.balance_coef > 0 or router.balance_in_group_coef > 0)


def metrics_of(config: TextConfig, sums: Sums) -> Metrics:
    """The metrics of a batch, float32 (counts int32): `loss` (cross entropy in nats per label, averaged as the objective says), `tokens`
    (labels), and with experts those of `router_metrics`."""
    metrics: Metrics = {"loss": sums.loss, "tokens": sums.labels}
    return metrics if sums.stats is None else metrics | router_metrics(config, sums.stats)


def router_metrics(config: TextConfig, stats: RouterStats) -> Metrics:
    """What the routers did with a batch.

    Per MoE layer: `router/load` (assignments of each expert as a share of its group's), `router/entropy` (nats), `router/logit_max`.
    Scalars: `router/balance_loss` and `router/z_loss`, over all experts and `..._in_group`, `router/entropy_mean`, `router/logit_max_all`,
    `router/load_max` (of any expert, relative to the mean of its group) and `router/group_load_spread` (assignments of the fullest
    group less those of the emptiest: 0 by construction), `router/dead_experts` (share of all experts that no token of the batch chose)
    and `router/group_entropy_min` (of the load inside the worst group of any layer, 1 if its experts are chosen equally often).
    """
    tokens, groups = stats.tokens[0], config.router_n_groups
    load_LGe = stats.load_E.reshape(-1, groups, config.experts_per_group)
    metrics = {
        "router/load": (load_LGe / jnp.maximum(load_LGe.sum(-1, keepdims=True), 1)).reshape(stats.load_E.shape),
        "router/entropy": stats.entropy / jnp.maximum(tokens, 1),
        "router/logit_max": stats.logit_max,
        "router/entropy_mean": (stats.entropy / jnp.maximum(tokens, 1)).mean(),
        "router/logit_max_all": stats.logit_max.max(),
        "router/load_max": config.experts_per_group * (load_LGe / jnp.maximum(load_LGe.sum(-1, keepdims=True), 1)).max(),
        "router/group_load_spread": jnp.ptp(load_LGe.sum(-1), -1).max(),
        "router/dead_experts": (stats.load_E == 0).mean(),
        "router/group_entropy_min": load_entropy(load_LGe).min(),
        "router/balance_loss": balance_loss(stats.load_E, stats.mass_E, tokens),
        "router/balance_loss_in_group": balance_loss(stats.load_E, stats.mass_in_group_E, tokens, groups),
        "router/z_loss": z_loss(stats.z, tokens),
        "router/z_loss_in_group": z_loss(stats.z_in_group, tokens),
    }
    return jax.lax.stop_gradient(metrics)


def load_entropy(load: Float[Array, "*groups e"]) -> Float[Array, "*groups"]:
    """Entropy of how often the experts of a group are chosen, relative to that of equal shares; 1 for a group of one."""
    if (experts := load.shape[-1]) == 1:
        return jnp.ones(load.shape[:-1])
    shares = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
    return -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30)), -1) / math.log(experts)
