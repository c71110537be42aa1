"""AdamW and Muon with global-norm clipping, and an update that is applied only where loss and gradients are finite and within limits.

The learning rate is a function of the training step, not of the number of applied updates: a skipped step does not shift the
schedule, so that the decay ends with the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float

from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.groups import check_groups, learning_rate_factors, path_name, trained_parameters
from interns1pro_jax.optim.muon import MuonConfig, letters_of, scale_by_muon

_MOMENT_DTYPES = ("float32", "bfloat16")
# Words in the names of parameters that are not matrices, and of lookup tables.
_VECTORS = {"bias", "scale", "norm"}
_TABLES = {"embed", "position"}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101), for all parameters or beside Muon; which parameters are trained, and how fast.

    Groups of parameters are words of `optim.groups.PARTS` or expressions for the beginning of a parameter's path.

    Attributes:
      muon: Muon for the matrices; None trains them by AdamW, too.
      freeze: groups that are not trained. They have neither gradients nor moments.
      learning_rates: factors of the learning rate for groups; 1 elsewhere.
      weight_decay: decoupled decay of the matrices; vectors (norm scales, biases) are never decayed.
      decay_embeddings: decay lookup tables (token embeddings, learned positions) as well.
      clip_norm: largest global norm of the gradient; None does not clip.
      moment_dtype: storage of all moments; they are computed in float32.
      stochastic_rounding: round new parameters of bfloat16 up or down at random, with their exact value as the mean, so that updates
        smaller than the last bit are not lost. The random bits are those of the step and the parameter, on any mesh.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    clip_norm: float | None = 1.0
    moment_dtype: str = "float32"
    stochastic_rounding: bool = False
    muon: MuonConfig | None = None
    freeze: Sequence[str] = ()
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"OptimizerConfig.{name}={getattr(self, name)} must lie in 0..1, 1 excluded.")
        if self.eps <= 0:
            raise ConfigError(f"OptimizerConfig.eps={self.eps} must be positive.")
        if self.weight_decay < 0:
            raise ConfigError(f"OptimizerConfig.weight_decay={self.weight_decay} must not be negative.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"OptimizerConfig.clip_norm={self.clip_norm} must be positive; None does not clip.")
        if self.moment_dtype not in _MOMENT_DTYPES:
            raise ConfigError(
                f"OptimizerConfig.moment_dtype={self.moment_dtype!r} is not supported; use one of {', '.join(_MOMENT_DTYPES)}."
            )
        if isinstance(self.freeze, str):
            raise ConfigError(f"OptimizerConfig.freeze={self.freeze!r} must be a list of groups, such as [{self.freeze!r}].")
        for group, factor in self.learning_rates.items():
            if factor <= 0:
                raise ConfigError(f"OptimizerConfig.learning_rates[{group!r}]={factor} must be positive; `freeze` does not train a group.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """What one optimizer step returns.

    Attributes:
      params, opt_state: the new values, or the old ones bit for bit where `applied` is False.
      grad_norm: float32 scalar, global norm before clipping.
      learning_rate: float32 scalar.
      applied: bool scalar, whether loss and gradient norm were finite and within their limits.
    """

    params: Any
    opt_state: optax.OptState
    grad_norm: jax.Array
    learning_rate: jax.Array
    applied: jax.Array


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation without its learning rate, and the learning rate as a function of the step.

    Attributes:
      freeze, learning_rates: as in `OptimizerConfig`.
      kind: of the variables that are trained, but for those frozen.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    stochastic_rounding: bool = False
    freeze: Sequence[str] = ()
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kind: type[nnx.Variable] = nnx.Param

    def split(self, model: nnx.Module) -> tuple[nnx.State, nnx.State]:
        """What of a model is trained, and all its other variables.

        Raises:
          ConfigError: a group has no parameter, or nothing is left to train.
        """
        paths = [path_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, self.kind))]
        check_groups("OptimizerConfig.freeze", self.freeze, paths)
        check_groups("OptimizerConfig.learning_rates", self.learning_rates, paths)
        params, rest = nnx.state(model, trained_parameters(self.kind, self.freeze), ...)
        if not jax.tree.leaves(params):
            raise ConfigError(f"OptimizerConfig.freeze={list(self.freeze)} leaves no parameter to train; take a group out of it.")
        return params, rest

    def init(self, params: Any) -> optax.OptState:
        """State of the optimizer; moments have the sharding of their parameters."""
        return self.transform.init(params)

    def update(
        self,
        grads: Any,
        opt_state: optax.OptState,
        params: Any,
        step: jax.Array,
        loss: jax.Array,
        limits: Float[jax.Array, " 2"] | None = None,
    ) -> Update:
        """One update, applied only if `loss` and the norm of `grads` are finite and within `limits` (pure, for use inside jit).

        Args:
          grads: gradients with the structure of `params`, any float dtype; computed with in float32.
          step: int scalar, updates tried so far.
          limits: the largest loss and norm; None sets none.
        """
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        grad_norm = optax.tree.norm(grads)
        learning_rate = jnp.asarray(self.schedule(step), jnp.float32)
        directions, new_opt_state = self.transform.update(grads, opt_state, params)
        factors = learning_rate_factors(params, self.learning_rates)
        exact = jax.tree.map(lambda p, d, factor: p.astype(jnp.float32) - learning_rate * factor * d, params, directions, factors)
        if self.stochastic_rounding:
            step_key = jax.random.fold_in(jax.random.key(0), step)
            of_leaves = list(jax.random.split(step_key, len(jax.tree.leaves(params))))
            keys = jax.tree.unflatten(jax.tree.structure(params), of_leaves)
            new_params = jax.tree.map(lambda p, x, key: stochastic_round(x, key) if p.dtype == jnp.bfloat16 else x, params, exact, keys)
        else:
            new_params = jax.tree.map(lambda p, x: x.astype(p.dtype), params, exact)
        judged = jnp.stack([jnp.asarray(loss, jnp.float32), grad_norm])
        applied = jnp.all(jnp.isfinite(judged) & (judged <= (jnp.inf if limits is None else limits)))
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(applied, new, old), (new_params, new_opt_state), (params, opt_state))
        return Update(params, opt_state, grad_norm, learning_rate, applied)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16: one of the two neighbours of a finite value, the nearer one more often, so that the mean is the value."""
    random = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding.spec)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + random.astype(jnp.uint32)  # carries into the upper half by chance
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def decay_mask(params: nnx.State, embeddings: bool = False) -> nnx.State:
    """Which parameters are decayed: True or False in the place of each `nnx.Param`.

    Matrices are, vectors are not, and lookup tables are where `embeddings` says so. The name tells them apart (`wi_EDF`,
    `q_bias_QH`, `norm1_scale_D`, `embed_VD`); the number of axes would not, because stacked layers add one.
    """

    def decayed(path: str) -> bool:
        words = path.rpartition("/")[2].split("_")
        return _VECTORS.isdisjoint(words) and (embeddings or _TABLES.isdisjoint(words))

    return _by_variable(decayed, params)


def _stored_as(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner`, computed in float32 with its floating-point state stored in `dtype`."""

    def cast(tree: Any, to: str) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(params: Any) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, kind: type[nnx.Variable] = nnx.Param) -> Optimizer:
    """Clip, moments with bias correction or orthogonalised momentum, decoupled weight decay, learning rate of the step."""
    adam = _stored_as(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), config.moment_dtype)
    direction = adam
    if config.muon is not None:
        muon = _stored_as(scale_by_muon(config.muon), config.moment_dtype)
        direction = optax.partition({"adam": adam, "muon": muon}, _algorithms)
    return Optimizer(
        optax.chain(
            optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
            direction,
            optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.decay_embeddings)),
        ),
        schedule,
        config.stochastic_rounding,
        config.freeze,
        config.learning_rates,
        kind,
    )


def _algorithms(params: nnx.State) -> nnx.State:
    return _by_variable(lambda path: "muon" if letters_of(path) else "adam", params)


def _by_variable(function: Callable[[str], Any], params: nnx.State) -> nnx.State:
    """`function` of each variable's path, in its place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(path_name(path)), params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
