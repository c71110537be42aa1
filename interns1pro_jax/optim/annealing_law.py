"""Loss as a function of the learning rates so far (Tissue et al., arXiv:2408.11029), fitted to pilot runs; a schedule that it likes.

    L(s) = L0 + A * S1(s)^-alpha - C * S2(s)

S1 is the sum of the learning rates up to step s, S2 that of their drops, each counted with a weight that grows from 0 towards its full size
as steps pass (a drop pays off over the 1 / (1 - lambda) steps after it). The law is for one model, batch and data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares, minimize
from scipy.signal import lfilter

from interns1pro_jax.config import ConfigError

_POINTS = 400  # of each run, at most, that are fitted


@dataclasses.dataclass(frozen=True)
class AnnealingLaw:
    """The law's constants; `decay` is lambda."""

    floor: float
    scale: float
    power: float
    gain: float
    decay: float = 0.999

    def losses(self, rates: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
        """Predicted loss after each step of a schedule."""
        s1, s2 = areas(rates, self.decay)
        return self.floor + self.scale * s1**-self.power - self.gain * s2


def areas(rates: Float[np.ndarray, " steps"], decay: float) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """S1 and S2 after each step."""
    drops = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    return np.cumsum(rates), np.cumsum(lfilter([1.0], [1.0, -decay], drops))


def fit(runs: Sequence[tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]], warmup: int, decay: float = 0.999) -> AnnealingLaw:
    """The law of pilot runs, each given by its learning rates and losses per step; the first `warmup` steps are not fitted.

    Raises:
      ConfigError: fewer than two schedules, which leave the constants undetermined, or runs that are too short.
    """
    if (schedules := len({tuple(rates.tolist()) for rates, _ in runs})) < 2:
        raise ConfigError(
            f"a law needs pilot runs of at least two schedules, one of them with a decay; the {len(runs)} given have {schedules}. Add a "
            "run with another schedule."
        )
    s1, s2, losses = [], [], []
    for number, (rates, found) in enumerate(runs, 1):
        chosen = np.arange(warmup, len(rates))[:: max((len(rates) - warmup) // _POINTS, 1)]
        if not chosen.size:
            raise ConfigError(
                f"pilot run {number} of {len(runs)} has {len(rates)} steps, of which the first {warmup} are left out; make it longer, or "
                "leave out fewer."
            )
        of_run = areas(rates, decay)
        s1.append(of_run[0][chosen])
        s2.append(of_run[1][chosen])
        losses.append(found[chosen])
    x1, x2, y = (np.concatenate(parts) for parts in (s1, s2, losses))
    finite = np.isfinite(y)
    x1, x2, y = x1[finite], x2[finite], y[finite]

    def residuals(logs: np.ndarray) -> np.ndarray:
        floor, scale, power, gain = np.exp(logs)
        return np.log(np.maximum(floor + scale * x1**-power - gain * x2, 1e-6)) - np.log(y)

    best = None
    for power in (0.2, 0.5, 1.0):
        begin = np.log([0.7 * y.min(), 0.3 * y.min() * np.median(x1) ** power, power, 0.1 * y.min() / max(x2.max(), 1e-12)]).clip(-29, 29)
        found = least_squares(residuals, begin, loss="huber", f_scale=1e-3, bounds=(-30, 30))
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    floor, scale, power, gain = np.exp(best.x).tolist()
    return AnnealingLaw(floor, scale, power, gain, decay)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A warmup-stable-decay schedule and the loss that the law promises at its end; and the best loss of any schedule below the peak."""

    peak: float
    decay_fraction: float
    loss: float
    bound: float
    rates: Float[np.ndarray, " steps"]
    free_rates: Float[np.ndarray, " knots"]


def best_schedule(law: AnnealingLaw, steps: int, largest: float, warmup: int) -> Plan:
    """The best peak and length of a linear decay for a run of `steps`, with learning rates up to `largest`.

    The law is convex in the learning rates, so the best of all schedules, as a line through 64 knots, is found exactly: it bounds what a
    longer search could gain.
    """

    def wsd(peak: float, fraction: float) -> np.ndarray:
        step = np.arange(1, steps + 1)
        decay = np.clip((steps - step) / max(fraction * steps, 1), 0, 1)
        return peak * np.minimum(np.minimum(step / max(warmup, 1), 1), decay)

    peaks, fractions = largest * np.geomspace(0.05, 1, 14), (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    loss, peak, fraction = min((float(law.losses(wsd(p, f))[-1]), float(p), f) for p in peaks for f in fractions)
    knots = np.linspace(0, steps - 1, 64)

    def end(shares: np.ndarray) -> float:
        return float(law.losses(largest * np.interp(np.arange(steps), knots, shares))[-1])

    begin = np.interp(knots, np.arange(steps), wsd(peak, fraction)) / largest
    free = minimize(end, np.clip(begin, 1e-6, 1), bounds=[(1e-6, 1)] * len(knots), method="L-BFGS-B", options={"maxiter": 30})
    return Plan(peak, fraction, loss, min(float(free.fun), loss), wsd(peak, fraction), largest * free.x)
