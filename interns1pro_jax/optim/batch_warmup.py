"""Batches that grow with the tokens seen, and the gradient-noise scale that says when they should (spec 1.11).

The pipeline's batch is the smallest. An update takes one of them at first and several later, which are accumulated: so a run compiles one
program for each size, every device always computes parts of the same size, and the data come in the same order whatever the plan is.
Everything is a function of the step, so that a run continues exactly.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interns1pro_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchWarmup:
    """How many of the pipeline's batches an update takes.

    Attributes:
      tokens: ascending numbers of tokens, padding included, from which on an update takes more.
      factors: how many it takes then, each of them more than before.
    """

    tokens: Sequence[int] = ()
    factors: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.factors):
            raise ConfigError(f"BatchWarmup.tokens={list(self.tokens)} and factors={list(self.factors)} must be as many; give pairs.")
        if list(self.tokens) != sorted(set(self.tokens)) or any(t <= 0 for t in self.tokens):
            raise ConfigError(f"BatchWarmup.tokens={list(self.tokens)} must be positive and ascend.")
        if list(self.factors) != sorted(set(self.factors)) or any(f <= 1 for f in self.factors):
            raise ConfigError(f"BatchWarmup.factors={list(self.factors)} must begin above 1 and ascend.")

    def plan(self, batch_tokens: int) -> BatchPlan:
        """The plan for pipeline batches of `batch_tokens` tokens."""
        begins, firsts = [0], [0]
        for tokens, before in zip(self.tokens, (1, *self.factors), strict=False):
            needed = -(-tokens // batch_tokens) - firsts[-1]  # the pipeline's batches until then
            updates = max(-(-needed // before), 0)
            begins.append(begins[-1] + updates)
            firsts.append(firsts[-1] + updates * before)
        return BatchPlan(tuple(begins), tuple(firsts), (1, *self.factors))


CONSTANT_BATCH = BatchWarmup()


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which of the pipeline's batches each update takes: from update begins[i] on factors[i] at a time, the first of them firsts[i]."""

    begins: tuple[int, ...]
    firsts: tuple[int, ...]
    factors: tuple[int, ...]

    def factor(self, step: int) -> int:
        """Pipeline batches of update `step`, from 0."""
        return self.factors[bisect.bisect_right(self.begins, step) - 1]

    def first(self, step: int) -> int:
        """The first of them: all before it have been used."""
        stage = bisect.bisect_right(self.begins, step) - 1
        return self.firsts[stage] + (step - self.begins[stage]) * self.factors[stage]


class PipelineBatches(Protocol):
    """The pipeline's batches and their place (`train.feed`)."""

    def __getitem__(self, step: int, /) -> Any: ...
    def state(self, step: int) -> Mapping[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def metrics(self, step: int) -> Mapping[str, float]: ...


class GrowingBatches:
    """The batches of updates: as many of the pipeline's as the plan says, joined so that a device's rows are its rows of the first, then
    those of the second, and so on: the parts that it accumulates.

    Args:
      rows_per_shard: rows of a pipeline batch on each part of the mesh that batches are split over.
    """

    def __init__(self, batches: PipelineBatches, plan: BatchPlan, rows_per_shard: int):
        self._batches, self._plan, self._rows = batches, plan, rows_per_shard

    def __getitem__(self, step: int) -> Any:
        first, factor = self._plan.first(step), self._plan.factor(step)
        parts = [self._batches[first + number] for number in range(factor)]

        def joined(*xs: np.ndarray) -> np.ndarray:
            by_shard = np.stack(xs).reshape(factor, -1, self._rows, *xs[0].shape[1:]).swapaxes(0, 1)
            return by_shard.reshape(-1, *xs[0].shape[1:])

        return jax.tree.map(joined, *parts) if factor > 1 else parts[0]

    def rows(self, rows: np.ndarray, factor: int) -> np.ndarray:
        """Which rows of a joined batch of `factor` batches the `rows` of each make."""
        return ((rows.reshape(-1, self._rows)[:, :1] * factor) + np.arange(self._rows * factor)).ravel()

    def state(self, step: int) -> Mapping[str, Any]:
        return self._batches.state(self._plan.first(step))

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches.restore(state)

    def metrics(self, step: int) -> Mapping[str, float]:
        return self._batches.metrics(self._plan.first(step))


def noise_estimates(squares: Float[Array, ""], square: Float[Array, ""], parts: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Unbiased estimates (arXiv:1812.06162, appendix A.1) of the squared norm of the true gradient, and of the variance of the gradient of
    a batch of this size. Their ratio, each averaged over steps first, is the noise scale in batches.

    Args:
      squares: mean of the squared norms of the gradients of the parts, each of the mean over its part.
      square: squared norm of the gradient of the whole batch.
      parts: of the batch, of equal size.
    """
    true = (parts * square - squares) / (parts - 1)
    return true, (squares - square) / (1 - 1 / parts) / parts


def noise_scale(true_squares: Sequence[float], variances: Sequence[float], batch_tokens: float) -> float:
    """B_simple in tokens, of the estimates of many steps: the batch at which noise and gradient are equal. A batch well below it makes
    almost as much progress per token as any smaller one; one well above wastes tokens. NaN where the gradient drowns in noise."""
    gradient = float(jnp.mean(jnp.asarray(true_squares)))
    return float(np.mean(variances)) / gradient * batch_tokens if gradient > 0 else float("nan")
