"""Learning-rate schedules: functions of the step (0 for the first update), usable inside jit.

Warmup-stable-decay is the schedule of the paper's pre-training; its decay shape and length are not published, so the
defaults are 1 - sqrt over the last tenth, the best of the shapes compared in arXiv:2405.18392.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from interns1pro_jax.config import ConfigError

# Share of the way from the peak (1) to the final rate (0), as a function of the share of the decay that is done.
DECAY_SHAPES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "1-sqrt": lambda done: 1 - jnp.sqrt(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_rate(peak: float, warmup_steps: int) -> None:
    _check(peak > 0, f"peak={peak} must be a positive learning rate.")
    _check(warmup_steps >= 0, f"warmup_steps={warmup_steps} must not be negative.")


def constant(peak: float, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warmup over `warmup_steps` updates, then `peak` for ever.

    The first update uses peak / warmup_steps, not 0, so that no batch is wasted.

    Raises:
      ConfigError: a rate that is not positive, a negative number of steps.
    """
    _check_rate(peak, warmup_steps)
    if warmup_steps == 0:
        return optax.constant_schedule(peak)
    return optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))


def warmup_stable_decay(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_fraction: float | None = None,
    decay_shape: str = "1-sqrt",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear warmup to `peak`, then `peak`, then a decay that reaches `final_fraction * peak` at `total_steps`.

    Args:
      total_steps: updates of the whole run.
      decay_steps, decay_fraction: length of the decay, in updates or as a share of `total_steps`; give at most one. A tenth of
        the run where neither is given.
      decay_shape: one of `DECAY_SHAPES`.

    Raises:
      ConfigError: an unknown shape, both lengths, or a warmup and a decay that do not fit in `total_steps`.
    """
    _check_rate(peak, warmup_steps)
    _check(total_steps > 0, f"total_steps={total_steps} must be positive.")
    _check(decay_shape in DECAY_SHAPES, f"decay_shape={decay_shape!r} is unknown; use one of {', '.join(DECAY_SHAPES)}.")
    _check(0 <= final_fraction <= 1, f"final_fraction={final_fraction} must lie in 0..1.")
    _check(
        decay_steps is None or decay_fraction is None,
        f"decay_steps={decay_steps} and decay_fraction={decay_fraction} both set the length of the decay; give one of them.",
    )
    if decay_steps is None:
        fraction = 0.1 if decay_fraction is None else decay_fraction
        _check(0 <= fraction <= 1, f"decay_fraction={fraction} must lie in 0..1.")
        decay_steps = round(fraction * total_steps)
    _check(decay_steps >= 0, f"decay_steps={decay_steps} must not be negative.")
    _check(
        warmup_steps + decay_steps <= total_steps,
        f"warmup_steps={warmup_steps} and decay_steps={decay_steps} do not fit in total_steps={total_steps}; shorten one of them.",
    )
    if decay_steps == 0:
        return constant(peak, warmup_steps)

    def decay(step: jax.Array) -> jax.Array:
        done = jnp.clip(step / decay_steps, 0.0, 1.0)
        return peak * (final_fraction + (1 - final_fraction) * DECAY_SHAPES[decay_shape](done))

    return optax.join_schedules([constant(peak, warmup_steps), decay], [total_steps - decay_steps])


def cosine(peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> optax.Schedule:
    """Linear warmup to `peak`, then half a cosine down to `final_fraction * peak` at `total_steps`.

    Raises:
      ConfigError: as for `warmup_stable_decay`, of which it is the case without a stable part.
    """
    _check_rate(peak, warmup_steps)
    return warmup_stable_decay(
        peak, total_steps, warmup_steps, decay_steps=max(total_steps - warmup_steps, 0), decay_shape="cosine", final_fraction=final_fraction
    )
