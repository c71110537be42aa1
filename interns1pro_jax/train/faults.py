"""What becomes of steps that go wrong.

The devices judge a step before its update is applied: a loss or gradient norm that is not finite, that is too large, or that lies far
above those of the steps before, leaves parameters and moments as they were (`FaultPolicy.limits`, `remember`). The host sees the
verdict a step later and decides what follows if it goes on (`Guard`): nothing, the end of the run, or the way back to a checkpoint from
before it began, past the batches that led there (PaLM, arXiv:2204.02311, section 5.1). All that either of them remembers is in the
checkpoints, and every process comes to the same verdict, so a continued run decides as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from interns1pro_jax.config import ConfigError

ACTIONS = ("stop", "rewind")


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """Which steps are bad, and what follows them. The update of a bad step is never applied.

    A step is bad if its loss or the norm of its gradient is not finite, if the norm is above `max_grad_norm`, or if either of them is more
    than `spike_deviations` standard deviations above its mean over the last `window` good steps. Spikes are looked for once there have
    been so many.

    Attributes:
      max_grad_norm: before clipping; None sets no limit.
      spike_deviations: None looks for no spikes. 6 misses no real one, and hits a normal value less than once in 10**8 steps.
      window: of good steps, when spikes are looked for.
      skip: how many bad steps in a row are passed over.
      then: what follows one more. "stop" ends the run; "rewind" goes back to the newest checkpoint from before the first of them, and on
        with the batches after the last of them: none since that checkpoint is used again.
      max_rewinds: of the whole run; one more stops it.
    """

    max_grad_norm: float | None = None
    spike_deviations: float | None = None
    window: int = 128
    skip: int = 0
    then: str = "stop"
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "spike_deviations"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"FaultPolicy.{name}={value!r} must be positive; None does not look at it.")
        for name, least in (("window", 2), ("skip", 0), ("max_rewinds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"FaultPolicy.{name}={getattr(self, name)!r} must be at least {least}.")
        if self.then not in ACTIONS:
            raise ConfigError(f"FaultPolicy.then={self.then!r} is unknown; use one of {', '.join(ACTIONS)}.")

    def limits(self, history_2W: Float[Array, "2 W"]) -> Float[Array, " 2"]:
        """The largest loss and gradient norm of a good step; for use inside jit."""
        limits = jnp.array([jnp.inf, jnp.inf if self.max_grad_norm is None else self.max_grad_norm], jnp.float32)
        if self.spike_deviations is None:
            return limits
        spike = history_2W.mean(1) + self.spike_deviations * history_2W.std(1)
        return jnp.where(jnp.isfinite(spike), jnp.minimum(limits, spike), limits)  # not finite as long as the window is not full


STOP_IF_NOT_FINITE = FaultPolicy()


def empty_history(window: int) -> Float[Array, "2 W"]:
    """That of a run in which nothing has happened."""
    return jnp.full((2, window), jnp.inf, jnp.float32)


def remember(history_2W: Float[Array, "2 W"], good_steps: Array, loss: Array, grad_norm: Array, good: Array) -> Float[Array, "2 W"]:
    """`history_2W` with a step's loss and gradient norm in the place of the oldest, if it was good; for use inside jit.

    Args:
      good_steps: how many there have been before this one.
    """
    oldest = jnp.arange(history_2W.shape[1]) == good_steps % history_2W.shape[1]
    return jnp.where(good & oldest, jnp.stack([loss, grad_norm])[:, None].astype(jnp.float32), history_2W)


class BadStepError(RuntimeError):
    """More bad steps in a row than the policy passes over; the message names the step, its values, and where its batch was dumped."""


class Rewind(Exception):
    """The run goes on from a checkpoint of `before` or earlier, with the batches after those of step `after`."""

    def __init__(self, before: int, after: int, why: str):
        super().__init__(why)
        self.before, self.after = before, after


class Guard:
    """Counts bad steps in a row, and says what follows them. All processes see the same numbers, and so decide the same.

    Attributes:
      skipped_batches: how many batches rewinds have left out so far: step n uses batch n + skipped_batches.
      rewinds: how many there have been.
    """

    def __init__(self, policy: FaultPolicy):
        self._policy = policy
        self._in_a_row = 0
        self.skipped_batches = self.rewinds = 0

    def state(self) -> dict[str, int]:
        """JSON for the checkpoint of the step judged last."""
        return {"in_a_row": self._in_a_row, "skipped_batches": self.skipped_batches, "rewinds": self.rewinds}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken."""
        self._in_a_row, self.skipped_batches, self.rewinds = state["in_a_row"], state["skipped_batches"], state["rewinds"]

    def good(self) -> None:
        """The step was good."""
        self._in_a_row = 0

    def bad(self, step: int, what: str) -> None:
        """The step was bad; returns if it is passed over.

        Args:
          what: happened, for the message.

        Raises:
          Rewind: to go back.
          BadStepError: to end the run.
        """
        self._in_a_row += 1
        policy = self._policy
        if self._in_a_row <= policy.skip:
            return
        what = f"{what}. {self._in_a_row} bad steps in a row, {policy.skip} are passed over (FaultPolicy.skip)"
        if policy.then == "rewind" and self.rewinds < policy.max_rewinds:
            raise Rewind(step - self._in_a_row, step, what)
        if policy.then == "rewind":
            what += f", after {self.rewinds} rewinds of {policy.max_rewinds} (FaultPolicy.max_rewinds)"
        raise BadStepError(
            f"{what}. Look at the batch, lower the learning rate, or let the policy pass over more; starting again continues from the "
            "last checkpoint."
        )

    def rewound(self, step: int, after: int, skipped_batches: int, rewinds: int) -> None:
        """The run is at `step` again, and goes on with the batches after those of step `after`.

        Args:
          skipped_batches, rewinds: as they were before the state of the checkpoint was taken over.
        """
        self._in_a_row, self.skipped_batches, self.rewinds = 0, skipped_batches + after - step, rewinds + 1


def describe(step: int, metrics: Mapping[str, Any]) -> str:
    """A bad step in words, from its metrics on the host: what was judged is `objective`, where a step has more losses than `loss`."""
    judged = "objective" if "objective" in metrics else "loss"
    values, limits = (metrics[judged], metrics["grad_norm"]), metrics.get("limits", (math.inf, math.inf))
    parts = [
        f"{name} {float(value):.6g}" + (f" (limit {float(limit):.6g})" if math.isfinite(limit) else "")
        for name, value, limit in zip((judged, "gradient norm"), values, limits, strict=True)
    ]
    return f"step {step} is bad: {', '.join(parts)}; its update was not applied"
