"""The training step: a pure function of state and batch (DESIGN 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError, TextConfig
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.layers.router import probes
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.ops.losses import IGNORED, ordered_sums, token_log_probs
from interns1pro_jax.optim.batch_warmup import noise_estimates
from interns1pro_jax.optim.optimizer import Optimizer
from interns1pro_jax.train.faults import STOP_IF_NOT_FINITE, FaultPolicy, remember
from interns1pro_jax.train.objective import MEAN_OVER_TOKENS, Counts, Metrics, Objective, Sums, counts_beforehand, loss_function, metrics_of
from interns1pro_jax.train.state import TrainState, add_tokens

_GRADIENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is computed; no choice changes its loss or gradients beyond rounding (docs/architecture.md has what each costs).

    Attributes:
      remat: what the backward keeps of a block (`layers.decoder.REMAT`).
      moe_chunks: parts in which a device's tokens go through the experts (`layers.moe.expert_parallel_mlp`).
      microbatches: parts of the batch that are computed one after the other; their gradients add up to those of the batch.
      gradient_dtype: in which they add up.
      noise_scale: measure the gradient noise (`optim.batch_warmup.noise_estimates`) from the gradients of the microbatches.
    """

    remat: str = "none"
    moe_chunks: int = 1
    microbatches: int = 1
    gradient_dtype: str = "float32"
    noise_scale: bool = False

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ConfigError(f"StepConfig.remat={self.remat!r} is unknown; use one of {', '.join(REMAT)}.")
        for name in ("moe_chunks", "microbatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"StepConfig.{name}={getattr(self, name)} must be at least 1; 1 does not divide.")
        if self.noise_scale and self.microbatches == 1:
            raise ConfigError(
                f"StepConfig.noise_scale=True compares the gradients of microbatches, and microbatches={self.microbatches}; set 2 or more."
            )
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
    objective: Objective = MEAN_OVER_TOKENS,
    *,
    compiler_options: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state given is consumed (its buffers are reused).

    Args:
      faults: which updates are not applied; that of `init_state`.
      compiler_options: of XLA, as its flags are named without dashes; a backend refuses those that are not its own.

    Metrics are those of `metrics_of`, and `objective` (cross entropy and all weighed losses of the routers), `grad_norm` (before clipping),
    `learning_rate`, `applied` (whether the update was), `limits` (of objective and gradient norm), and `router/unselected_grad` per MoE
    layer: the norm of the straight-through gradient on the logits of experts that were not run, and `router/unselected_grad_norm` over all
    layers.

    Raises:
      ConfigError: while tracing, rows or tokens that do not divide as `step_config` asks; parameters in bfloat16, whose updates would
        mostly be rounded away unless the optimizer rounds them stochastically.
    """
    remat, moe_chunks, microbatches = step_config.remat, step_config.moe_chunks, step_config.microbatches

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not optimizer.stochastic_rounding and any(p.dtype != jnp.float32 for p in jax.tree.leaves(state.params)):
            raise ConfigError(
                "parameters in bfloat16 cannot be trained with updates rounded to the nearest: most are smaller than their last bit. Set "
                "param_dtype='float32' (and dtype='bfloat16' to compute in bfloat16), or OptimizerConfig.stochastic_rounding=True."
            )
        counts, probe_LR = Counts.of(batch, objective), probes(config.num_moe_layers)

        def value(params: Any, probe_LR: jax.Array, part: Batch, counts: Counts) -> tuple[jax.Array, Sums]:
            model = nnx.merge(graphdef, params, state.buffers)
            return loss_function(model, part, counts, probe_LR, objective=objective, remat=remat, moe_chunks=moe_chunks)

        gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        if microbatches == 1:
            (loss, sums), (grads, squares_LR) = gradient(state.params, probe_LR, batch, counts)
        else:
            parts = split_batch(batch, microbatches)
            if config.num_moe_layers and counts_beforehand(config.router):
                stats = jax.lax.map(lambda part: value(state.params, probe_LR, part, counts)[1].stats, parts)
                counts = dataclasses.replace(counts, load_LE=stats.load_E.sum(0))

            def add_part(total: Any, part: Batch) -> tuple[Any, tuple[Sums, jax.Array]]:
                (loss, sums), gradients = gradient(state.params, probe_LR, part, counts)
                square = optax.tree.norm(gradients[0], squared=True) if step_config.noise_scale else jnp.float32(0)
                return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (loss, gradients)), (sums, square)

            zeros = jnp.float32(0), (jax.tree.map(lambda p: jnp.zeros_like(p, step_config.gradient_dtype), state.params), probe_LR)
            (loss, (grads, squares_LR)), (sums, squares) = jax.lax.scan(add_part, zeros, parts)
            sums = Sums(sums.loss.sum(), sums.labels.sum(), None if sums.stats is None else sums.stats.over_rows(0))
        metrics = metrics_of(config, sums)
        limits = faults.limits(state.history)
        update = optimizer.update(grads, state.opt_state, state.params, state.step, loss, limits)
        metrics |= {"objective": loss, "grad_norm": update.grad_norm}
        metrics |= {"learning_rate": update.learning_rate, "applied": update.applied, "limits": limits}
        if step_config.noise_scale:
            # Each part has its share of the sum: the gradient of its own mean is as many times larger as there are parts.
            true, variance = noise_estimates(microbatches**2 * squares.mean(), update.grad_norm**2, microbatches)
            metrics |= {"noise/true_gradient_square": true, "noise/gradient_variance": variance}
        if config.num_moe_layers:
            squares_L = squares_LR.sum(1)
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


def make_eval_step(
    graphdef: nnx.GraphDef, groups: int = 1
) -> Callable[[TrainState, Batch, Int[Array, "B T"]], tuple[Float[Array, " groups"], Int[Array, " groups"]]]:
    """The jitted evaluation `(state, batch, group of each position) -> (sums of losses over the labels, numbers of labels)` by group."""

    def evaluate(state: TrainState, batch: Batch, groups_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state.params, state.buffers)
        log_probs_BT = token_log_probs(model(batch.inputs).hidden_BTD, model.text.head_DV, batch.labels)
        is_in_BTG = sharding.constrain(groups_BT, "batch", "sequence")[..., None] == jnp.arange(groups)
        counted_BT = sharding.constrain(batch.labels != IGNORED, "batch", "sequence")
        counts_G = jnp.sum(is_in_BTG & counted_BT[..., None], (0, 1), dtype=jnp.int32)
        return ordered_sums(jnp.where(is_in_BTG, -sharding.constrain(log_probs_BT, "batch", "sequence")[..., None], 0)), counts_G

    return jax.jit(evaluate)
