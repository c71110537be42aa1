"""The training step: a pure function of state and batch (DESIGN 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import ConfigError, TextConfig
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.layers.router import RouterStats
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.losses import cross_entropy
from interns1pro_jax.ops.router_losses import balance_loss, z_loss
from interns1pro_jax.optim.optimizer import Optimizer
from interns1pro_jax.train.state import TrainState, add_tokens

Metrics = dict[str, jax.Array]


def loss_function(
    model: InternS1Pro, batch: Batch, probe_L: Float[Array, " L"] | None = None, remat: str = "none"
) -> tuple[Float[Array, ""], Metrics]:
    """Mean loss over the batch's labels plus the router's auxiliary losses, and the step's metrics.

    Metrics (float32, counts int32): `loss` (cross entropy in nats per label), `tokens` (labels), and with experts, per MoE layer,
    `router/load` (assignments of each expert as a share of its group's), `router/entropy` (nats), `router/logit_max`, and the
    scalars `router/balance_loss`, `router/balance_loss_in_group`, `router/z_loss`, `router/entropy_mean`, `router/logit_max_all`,
    `router/load_max` (of any expert, relative to the mean of its group) and `router/group_load_spread` (assignments of the fullest
    group less those of the emptiest: 0 by construction).
    """
    text = model.config.text
    out = model(batch.inputs, probe_L=probe_L, remat=remat)
    total, count = cross_entropy(out.hidden_BTD, model.text.lm_head_DV[...], batch.labels)
    loss = total / jnp.maximum(count, 1)
    metrics: Metrics = {"loss": loss, "tokens": count}
    if out.stats is not None:
        auxiliary, router_metrics = router_terms(text, out.stats)
        loss = loss + auxiliary
        metrics |= router_metrics
    return loss, metrics


def router_terms(config: TextConfig, stats: RouterStats) -> tuple[Float[Array, ""], Metrics]:
    """The weighted auxiliary loss of all MoE layers, and the router's metrics (see `loss_function`)."""
    tokens, groups = stats.tokens[0], config.router_n_groups
    balance = balance_loss(stats.load_E, stats.mass_E, tokens)
    z = z_loss(stats.z, tokens)
    load_LGe = stats.load_E.reshape(-1, groups, config.experts_per_group)
    metrics = {
        "router/load": (load_LGe / jnp.maximum(load_LGe.sum(-1, keepdims=True), 1)).reshape(stats.load_E.shape),
        "router/entropy": stats.entropy / jnp.maximum(tokens, 1),
        "router/logit_max": stats.logit_max,
        "router/entropy_mean": (stats.entropy / jnp.maximum(tokens, 1)).mean(),
        "router/logit_max_all": stats.logit_max.max(),
        "router/load_max": config.experts_per_group * (load_LGe / jnp.maximum(load_LGe.sum(-1, keepdims=True), 1)).max(),
        "router/group_load_spread": jnp.ptp(load_LGe.sum(-1), -1).max(),
        "router/balance_loss": balance,
        "router/balance_loss_in_group": balance_loss(stats.load_E, stats.mass_E, tokens, groups),
        "router/z_loss": z,
    }
    return config.router.balance_coef * balance + config.router.z_coef * z, jax.lax.stop_gradient(metrics)


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TextConfig,
    optimizer: Optimizer,
    *,
    remat: str = "none",
    compiler_options: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state given is consumed (its buffers are reused).

    Args:
      remat: what the backward keeps of a block (`layers.decoder.REMAT`).
      compiler_options: of XLA, as its flags are named without dashes; a backend refuses those that are not its own.

    Metrics are those of `loss_function`, and `grad_norm` (before clipping), `learning_rate`, `finite` (whether the update was
    applied), and `router/unselected_grad` per MoE layer: the norm of the straight-through gradient on the logits of experts
    that were not run, and `router/unselected_grad_norm` over all layers.

    Raises:
      ConfigError: an unknown `remat`, or parameters in bfloat16, whose updates would mostly be rounded away.
    """
    if config.param_dtype != "float32":
        raise ConfigError(
            f"TextConfig.param_dtype={config.param_dtype!r} cannot be trained: most updates are smaller than its last bit. "
            "Set param_dtype='float32' (and dtype='bfloat16' to compute in bfloat16)."
        )
    if remat not in REMAT:
        raise ConfigError(f"remat={remat!r} is unknown; use one of {sorted(REMAT)}.")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def objective(params: Any, probe_L: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss_function(nnx.merge(graphdef, params, state.buffers), batch, probe_L, remat)

        probe_L = jnp.zeros((config.num_moe_layers,), jnp.float32)
        (loss, metrics), (grads, squares_L) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(state.params, probe_L)
        update = optimizer.update(grads, state.opt_state, state.params, state.step, loss)
        metrics |= {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate, "finite": update.finite}
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
                skipped=state.skipped + jnp.where(update.finite, 0, 1),
            ),
            metrics,
        )

    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[TrainState, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The jitted evaluation `(state, batch) -> (sum of losses over the labels, number of labels)`."""

    def evaluate(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state.params, state.buffers)
        return cross_entropy(model(batch.inputs).hidden_BTD, model.text.lm_head_DV[...], batch.labels)

    return jax.jit(evaluate)
