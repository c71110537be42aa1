"""The tables and the picture of an expansion study, from the records of its arms."""

from __future__ import annotations

import csv
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from interns1pro_jax.train.metrics import read_records, replace

BASE, UNEXPANDED, INITIAL = "base", "unexpanded", "initial.json"
_PACKAGES = ("jax", "flax", "optax", "numpy")
_BELOW = {
    "device_load_max": "fullest of 8 devices, relative to the mean",
    "weights_cosine": "cosine of copies' weights",
    "router_overlap": "tokens that copies share (Jaccard)",
    "output_difference": "difference of copies' outputs",
}

Curve = Mapping[str, Any]


def write(workdir: Path) -> bool:
    """`study.json`: every evaluation of every arm and seed; `study.csv`, `study.md`: means and deviations; `study.png`: curves.

    Runs that are not complete yet count as far as they are: all are cut to the evaluations that all have. Returns whether there was
    anything to write. Device and versions in `study.json` are those of the process that writes it.
    """
    homes = {int(path.name.removeprefix("seed_")): path for path in sorted(workdir.glob("seed_*"))}
    names = sorted({path.parent.name for home in homes.values() for path in home.glob(f"*/{INITIAL}")} - {UNEXPANDED})
    base = {seed: curve(home / BASE) for seed, home in homes.items()}
    runs = {arm: {seed: curve(home / arm) for seed, home in homes.items()} for arm in (UNEXPANDED, *names)}
    runs = {arm: {seed: run for seed, run in of.items() if len(run.get("step", ())) > 1} for arm, of in runs.items()}
    # Arms are told less the unexpanded model of the same seed.
    runs = {arm: {seed: run for seed, run in of.items() if seed in runs[UNEXPANDED]} for arm, of in runs.items()}
    runs = {arm: of for arm, of in runs.items() if of}
    if not runs:
        return False
    shortest = min(len(run["step"]) for of in runs.values() for run in of.values())
    runs = {arm: {seed: {k: v[:shortest] for k, v in run.items()} for seed, run in of.items()} for arm, of in runs.items()}
    versions = {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    facts = {"date": datetime.now(UTC).date().isoformat(), "device": jax.devices()[0].device_kind, "versions": versions}
    facts |= {"last_fifth_of_base_gains": {seed: gain_of_last_fifth(run) for seed, run in base.items() if run}}
    replace(workdir / "study.json", json.dumps(facts | {"base": base, "arms": runs}).encode())
    lines = table(runs)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    replace(workdir / "study.csv", out.getvalue().encode())
    replace(workdir / "study.md", markdown(lines).encode())
    picture = io.BytesIO()
    draw(base, runs).savefig(picture, dpi=110)
    replace(workdir / "study.png", picture.getvalue())
    return True


def gain_of_last_fifth(run: Curve) -> float:
    """Nats per token that a run's last fifth of training has gained: what is left of a plateau."""
    return float(np.interp(0.8 * run["step"][-1], run["step"], run["loss"]) - run["loss"][-1])


def curve(home: Path) -> dict[str, list[float | None]]:
    """Evaluations of one run: `step`, and a list for every quantity; None where one was not measured."""
    records = [{"step": 0} | json.loads((home / INITIAL).read_text())] if (home / INITIAL).exists() else []
    for record in read_records(home):
        if "eval/loss" in record:
            values = {name.removeprefix("eval/"): value for name, value in record.items() if name.startswith("eval/")}
            records.append({"step": record["step"]} | values)
    names = sorted({name for record in records for name in record})
    return {name: [_number(record.get(name)) for record in records] for name in names}


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


# Column of the tables: quantity, and which evaluation of a run (the first is right after the expansion).
_COLUMNS = {
    "Top-1 and Top-2 apart": ("separation", 0),
    "loss right after": ("loss", 0),
    "loss at the end": ("loss", -1),
    "fullest device, at the end": ("device_load_max", -1),
    "experts without a token, right after": ("unused_experts", 0),
    "at the end": ("unused_experts", -1),
    "fullest expert of its group": ("expert_load_max", -1),
    "copies: cosine of weights": ("weights_cosine", -1),
    "of router rows": ("router_cosine", -1),
    "shared tokens": ("router_overlap", -1),
    "difference of outputs": ("output_difference", -1),
}


def table(runs: Mapping[str, Mapping[int, Curve]]) -> list[list[str]]:
    """A header, and a line for each arm: mean and standard deviation over the seeds; "" where a quantity was not measured."""
    lines = [["arm", *_COLUMNS, "less unexpanded right after", "less unexpanded at the end"]]
    for arm, of in runs.items():
        values = [[run[name][at] if name in run else None for run in of.values()] for name, at in _COLUMNS.values()]
        values += [differences(runs, arm, at).tolist() for at in (0, -1)]
        lines.append([arm, *map(_cell, values)])
    return lines


def differences(runs: Mapping[str, Mapping[int, Curve]], arm: str, at: int) -> np.ndarray:
    """Loss of an arm less that of training on without expansion, from the same base, for each seed that has both."""
    return np.array([run["loss"][at] - runs[UNEXPANDED][seed]["loss"][at] for seed, run in runs[arm].items() if seed in runs[UNEXPANDED]])


def _cell(of_seeds: Sequence[float | None]) -> str:
    known = [value for value in of_seeds if value is not None]
    if not known:
        return ""
    return f"{np.mean(known):.4f}" + (f" ± {np.std(known, ddof=1):.4f}" if len(known) > 1 else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return head + "| --- |" + " ---: |" * (len(lines[0]) - 1) + "\n" + "".join(body)


def draw(base: Mapping[int, Curve], runs: Mapping[str, Mapping[int, Curve]]) -> Figure:
    """Held-out loss before and after, balance over devices, and how the copies grow apart; bands and bars are a standard deviation over the
    seeds."""
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    colours = {arm: f"C{i}" for i, arm in enumerate(runs)}
    before, after, apart, bars = axes[0]
    for number, run in enumerate(filter(None, base.values())):
        before.plot(run["step"], run["loss"], color="black", alpha=0.6, label="seeds" if number == 0 else None)
    gains = [gain_of_last_fifth(run) for run in base.values() if run]
    before.set(title=f"Before: the last fifth gains {np.mean(gains):.4f} nats", xlabel="steps", ylabel="held-out loss (nats per token)")
    for arm, of in runs.items():
        _band(after, list(of.values()), "loss", colours[arm], arm)
        curves = [
            {"step": run["step"], "loss": np.subtract(run["loss"], runs[UNEXPANDED][seed]["loss"])}
            for seed, run in of.items()
            if seed in runs[UNEXPANDED]
        ]
        _band(apart, curves, "loss", colours[arm], arm)
    after.set(title="After: expanded, and trained on", xlabel="steps after expansion", ylabel="held-out loss (nats per token)")
    after.legend(fontsize=8)
    apart.set(title="The same, less unexpanded of the same base", xlabel="steps after expansion", ylabel="difference (nats per token)")
    ends = {arm: differences(runs, arm, -1) for arm in runs}
    bars.barh(
        list(ends),
        [x.mean() for x in ends.values()],
        xerr=[x.std(ddof=1) if len(x) > 1 else 0 for x in ends.values()],
        color=list(colours.values()),
    )
    bars.invert_yaxis()
    bars.axvline(0, color="black", lw=0.8)
    bars.set(title="At the end, less unexpanded", xlabel="held-out loss, difference (lower is better)")
    for axis, (name, title) in zip(axes[1], _BELOW.items(), strict=True):
        for arm, of in runs.items():
            if name in next(iter(of.values())):
                _band(axis, list(of.values()), name, colours[arm], arm)
        axis.set(title=title, xlabel="steps after expansion")
    return figure


def _band(axis: Any, curves: Sequence[Curve], name: str, colour: str, label: str) -> None:
    steps = curves[0]["step"]
    values = np.array([run[name] for run in curves], np.float64)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
    axis.plot(steps, mean, color=colour, label=label)
    axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


if __name__ == "__main__":  # python -m experiments.expansion_report WORKDIR: of a study that is not complete
    if len(sys.argv) != 2 or not write(Path(sys.argv[1])):
        sys.exit(
            "error: no study to report; use python -m experiments.expansion_report WORKDIR once its unexpanded model was evaluated twice."
        )
