"""The training step: a pure function of state and batch (DESIGN 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError, RouterConfig, TextConfig
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.layers.router import RouterStats
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.losses import IGNORED, cross_entropy
from interns1pro_jax.ops.router_losses import balance_loss, z_loss
from interns1pro_jax.optim.optimizer import Optimizer
from interns1pro_jax.train.faults import STOP_IF_NOT_FINITE, FaultPolicy, remember
from interns1pro_jax.train.state import TrainState, add_tokens

Metrics = dict[str, jax.Array]

_GRADIENT_DTYPES = ("float32", "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the losses are means over, in float32: a batch's labels, and its tokens that are not padding."""

    labels: Float[Array, ""]
    tokens: Float[Array, ""]

    @staticmethod
    def of(batch: Batch) -> Counts:
        def count(mask: Array) -> Array:
            return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)

        return Counts(count(batch.labels != IGNORED), count(batch.inputs.segment_ids > 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a batch adds up to: its losses (nats), its labels, and the router's statistics of every MoE layer."""

    loss: Float[Array, ""]
    labels: Int[Array, ""]
    stats: RouterStats | None


def loss_function(
    model: InternS1Pro,
    batch: Batch,
    counts: Counts | None = None,
    probe_L: Float[Array, " L"] | None = None,
    *,
    remat: str = "none",
    moe_chunks: int = 1,
) -> tuple[Float[Array, ""], Sums]:
    """Mean loss over the labels plus the router's auxiliary losses: the objective of training.

    Args:
      counts: those of the whole batch where `batch` is a part of it; the values of the parts then add up to that of the whole (see
        `RouterConfig.balance_over` for the one term that is not a mean).
      probe_L, remat, moe_chunks: as in `TextModel`.
    """
    text = model.config.text
    out = model(batch.inputs, probe_L=probe_L, remat=remat, moe_chunks=moe_chunks)
    total, labels = cross_entropy(out.hidden_BTD, model.text.head_DV, batch.labels)
    counts = Counts.of(batch) if counts is None else counts
    loss = total / jnp.maximum(counts.labels, 1)
    if out.stats is None:
        return loss, Sums(total, labels, None)
    return loss + auxiliary_loss(text.router, out.stats, counts.tokens), Sums(total, labels, out.stats.over_rows(1))


def auxiliary_loss(config: RouterConfig, stats: RouterStats, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Balancing and z-loss of all MoE layers, weighted; `stats` [L, B, ...] are those of the rows, `tokens` of the whole batch."""
    parts = stats if config.balance_over == "row" else jax.tree.map(lambda x: x[:, None], stats.over_rows(1))
    balance_P = jax.vmap(balance_loss, in_axes=(1, 1, 0))(parts.load_E, parts.mass_E, parts.tokens[0])
    balance = jnp.sum(balance_P * parts.tokens[0]) / jnp.maximum(tokens, 1)
    return config.balance_coef * balance + config.z_coef * z_loss(stats.z.sum(1), tokens)


def metrics_of(config: TextConfig, sums: Sums) -> Metrics:
    """The metrics of a batch, float32 (counts int32): `loss` (cross entropy in nats per label), `tokens` (labels), and with experts those
    of `router_metrics`."""
    metrics: Metrics = {"loss": sums.loss / jnp.maximum(sums.labels, 1), "tokens": sums.labels}
    return metrics if sums.stats is None else metrics | router_metrics(config, sums.stats)


def router_metrics(config: TextConfig, stats: RouterStats) -> Metrics:
    """What the routers did with a batch.

    Per MoE layer: `router/load` (assignments of each expert as a share of its group's), `router/entropy` (nats), `router/logit_max`.
    Scalars: `router/balance_loss`, `router/balance_loss_in_group`, `router/z_loss`, `router/entropy_mean`, `router/logit_max_all`,
    `router/load_max` (of any expert, relative to the mean of its group) and `router/group_load_spread` (assignments of the fullest
    group less those of the emptiest: 0 by construction).
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
        "router/balance_loss": balance_loss(stats.load_E, stats.mass_E, tokens),
        "router/balance_loss_in_group": balance_loss(stats.load_E, stats.mass_E, tokens, groups),
        "router/z_loss": z_loss(stats.z, tokens),
    }
    return jax.lax.stop_gradient(metrics)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is computed; no choice changes its loss or gradients beyond rounding (docs/architecture.md has what each costs).

    Attributes:
      remat: what the backward keeps of a block (`layers.decoder.REMAT`).
      moe_chunks: parts in which a device's tokens go through the experts (`layers.moe.expert_parallel_mlp`).
      microbatches: parts of the batch that are computed one after the other; their gradients add up to those of the batch.
      gradient_dtype: in which they add up.
    """

    remat: str = "none"
    moe_chunks: int = 1
    microbatches: int = 1
    gradient_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ConfigError(f"StepConfig.remat={self.remat!r} is unknown; use one of {', '.join(REMAT)}.")
        for name in ("moe_chunks", "microbatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"StepConfig.{name}={getattr(self, name)} must be at least 1.")
        if self.gradient_dtype not in _GRADIENT_DTYPES:
            raise ConfigError(
                f"StepConfig.gradient_dtype={self.gradient_dtype!r} is not supported; use one of {', '.join(_GRADIENT_DTYPES)}."
            )


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TextConfig,
    optimizer: Optimizer,
    step_config: StepConfig = StepConfig(),
    faults: FaultPolicy = STOP_IF_NOT_FINITE,
    *,
    compiler_options: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state given is consumed (its buffers are reused).

    Args:
      faults: which updates are not applied; that of `init_state`.
      compiler_options: of XLA, as its flags are named without dashes; a backend refuses those that are not its own.

    Metrics are those of `metrics_of`, and `grad_norm` (before clipping), `learning_rate`, `applied` (whether the update was), `limits`
    (of loss and gradient norm), and `router/unselected_grad` per MoE layer: the norm of the straight-through gradient on the logits
    of experts that were not run, and `router/unselected_grad_norm` over all layers.

    Raises:
      ConfigError: parameters in bfloat16, whose updates would mostly be rounded away unless the optimizer rounds them stochastically.
        While tracing: rows or tokens that do not divide as `step_config` asks.
    """
    if config.param_dtype != "float32" and not optimizer.stochastic_rounding:
        raise ConfigError(
            f"TextConfig.param_dtype={config.param_dtype!r} cannot be trained with updates rounded to the nearest: most are smaller than "
            "its last bit. Set param_dtype='float32' (and dtype='bfloat16' to compute in bfloat16), or "
            "OptimizerConfig.stochastic_rounding=True."
        )
    remat, moe_chunks, microbatches = step_config.remat, step_config.moe_chunks, step_config.microbatches

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts, probe_L = Counts.of(batch), jnp.zeros((config.num_moe_layers,), jnp.float32)

        def objective(params: Any, probe_L: jax.Array, part: Batch) -> tuple[jax.Array, Sums]:
            model = nnx.merge(graphdef, params, state.buffers)
            return loss_function(model, part, counts, probe_L, remat=remat, moe_chunks=moe_chunks)

        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        if microbatches == 1:
            (loss, sums), (grads, squares_L) = gradient(state.params, probe_L, batch)
        else:

            def add_part(total: Any, part: Batch) -> tuple[Any, Sums]:
                (loss, sums), gradients = gradient(state.params, probe_L, part)
                return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (loss, gradients)), sums

            zeros = jnp.float32(0), (jax.tree.map(lambda p: jnp.zeros_like(p, step_config.gradient_dtype), state.params), probe_L)
            (loss, (grads, squares_L)), parts = jax.lax.scan(add_part, zeros, split_batch(batch, microbatches))
            stats = None if parts.stats is None else parts.stats.over_rows(0)
            sums = Sums(parts.loss.sum(), parts.labels.sum(), stats)
        metrics = metrics_of(config, sums)
        limits = faults.limits(state.history)
        update = optimizer.update(grads, state.opt_state, state.params, state.step, loss, limits)
        metrics |= {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate, "applied": update.applied, "limits": limits}
        if config.num_moe_layers:
            metrics["router/unselected_grad"] = jnp.sqrt(squares_L)
            metrics["router/unselected_grad_norm"] = jnp.sqrt(squares_L.sum())
        return (
            TrainState(
                step=state.step + 1,
                params=update.params,
                buffers=state.buffers,
                opt_state=update.opt_state,
                tokens_seen=add_tokens(state.tokens_seen, metrics["tokens"]),
                skipped=state.skipped + jnp.where(update.applied, 0, 1),
                history=remember(state.history, state.step - state.skipped, loss, update.grad_norm, update.applied),
            ),
            metrics,
        )

    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))


def split_batch(batch: Batch, parts: int) -> Batch:
    """The batch as `parts` batches, stacked along a new first axis: each device splits its own rows, and nothing moves.

    Raises:
      ConfigError: a device's rows, or its packs of media, do not divide.
    """
    shards = sharding.shards("batch")

    def split(x: Array) -> Array:
        if x.shape[0] % (shards * parts):
            raise ConfigError(
                f"microbatches={parts}: an array of {x.shape[0]} rows or packs of media does not divide into {parts} parts on each of "
                f"{shards} devices or groups of them; the batch size (and the number of packs) must be a multiple of {shards * parts}."
            )
        rest = (None,) * (x.ndim - 1)
        return jax.shard_map(
            lambda x: x.reshape(parts, -1, *x.shape[1:]),
            in_specs=sharding.spec("batch", *rest),
            out_specs=sharding.spec(None, "batch", *rest),
        )(sharding.constrain(x, "batch", *rest))

    return jax.tree.map(split, batch)


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[TrainState, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The jitted evaluation `(state, batch) -> (sum of losses over the labels, number of labels)`."""

    def evaluate(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state.params, state.buffers)
        return cross_entropy(model(batch.inputs).hidden_BTD, model.text.head_DV, batch.labels)

    return jax.jit(evaluate)
