"""From pilot runs to a schedule: fits the loss as a function of the learning rates, predicts a longer run, and draws both.

    python -m tools.fit_learning_rate runs/pilot_constant runs/pilot_decay --steps 20000 --output runs/fit

Pilots are runs of the model, batch and data in question (`metrics.jsonl`), of at least two schedules, one with a decay. Writes `fit.json`
and `fit.png`, and prints what to bind in the recipe. `--check RUN` predicts a run that was not fitted and says by how much it misses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.annealing_law import AnnealingLaw, Plan, best_schedule, fit
from interns1pro_jax.train.metrics import read_records

Run = tuple[np.ndarray, np.ndarray]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="fit_learning_rate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pilots", type=Path, nargs="+", help="directories of pilot runs")
    parser.add_argument("--steps", type=int, required=True, help="of the run to plan")
    parser.add_argument("--output", type=Path, required=True, help="directory for fit.json and fit.png")
    parser.add_argument("--warmup", type=int, default=0, help="steps at the beginning of every run that are not fitted")
    parser.add_argument("--largest", type=float, help="learning rate; default the largest of the pilots")
    parser.add_argument("--check", type=Path, help="a run to predict and compare with")
    arguments = parser.parse_args(argv)
    try:
        runs = {str(path): _read(path) for path in arguments.pilots}
        law = fit(list(runs.values()), arguments.warmup)
        largest = arguments.largest or max(float(rates.max()) for rates, _ in runs.values())
        plan = best_schedule(law, arguments.steps, largest, arguments.warmup)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"law": dataclasses.asdict(law), "peak": plan.peak, "decay_fraction": plan.decay_fraction, "loss": plan.loss}
    content |= {"bound": plan.bound, "free_rates": plan.free_rates.tolist()}
    if arguments.check is not None:
        rates, losses = runs[f"check: {arguments.check.name}"] = _read(arguments.check)
        tail = slice(-max(len(losses) // 20, 1), None)
        content["check"] = {"predicted": float(law.losses(rates)[tail].mean()), "found": float(np.nanmean(losses[tail]))}
        print(f"{arguments.check}: predicted {content['check']['predicted']:.4f}, found {content['check']['found']:.4f}")
    (arguments.output / "fit.json").write_text(json.dumps(content, indent=1))
    draw(law, runs, plan).savefig(arguments.output / "fit.png", dpi=120)
    print(f"L = {law.floor:.4f} + {law.scale:.4g} S1^-{law.power:.3f} - {law.gain:.4g} S2")
    print(f"loss after {arguments.steps:,} steps: {plan.loss:.4f}; no schedule below {largest:.3g} promises less than {plan.bound:.4f}")
    print(f"warmup_stable_decay.peak = {plan.peak:.4g}\nwarmup_stable_decay.decay_fraction = {plan.decay_fraction:g}")
    print("warmup_stable_decay.decay_shape = 'linear'")
    return 0


def _read(directory: Path) -> Run:
    records = read_records(directory)
    if not records:
        raise ConfigError(f"{directory} has no records (metrics.jsonl); give directories of runs.")
    return tuple(np.array([r[name] if r[name] is not None else np.nan for r in records]) for name in ("learning_rate", "loss"))  # type: ignore[return-value]


def draw(law: AnnealingLaw, runs: dict[str, Run], plan: Plan) -> Figure:
    """Losses found and predicted, and the planned schedule."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, (rates, losses)) in enumerate(runs.items()):
        left.plot(losses, color=f"C{number}", alpha=0.3, linewidth=0.8)
        left.plot(law.losses(rates), color=f"C{number}", linestyle="--", label=name)
    left.plot(law.losses(plan.rates), color="black", label=f"planned, {plan.loss:.4f} at its end")
    low = min(plan.bound, *(float(np.nanmin(losses)) for _, losses in runs.values()))
    high = max(float(np.nanpercentile(losses, 98)) for _, losses in runs.values())
    left.set(xlabel="step", ylabel="loss; dashed: the law", xscale="log", ylim=(0.95 * low, high))
    left.legend(edgecolor="none", fontsize=8)
    right.plot(plan.rates, color="black", label="warmup-stable-decay")
    right.plot(np.linspace(0, len(plan.rates) - 1, len(plan.free_rates)), plan.free_rates, color="C3", label="best of all")
    right.set(xlabel="step", ylabel="learning rate")
    right.legend(edgecolor="none", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
