"""The tables and the picture of an expansion study, from the records of its arms."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from interns1pro_jax.checkpoint.safetensors_writer import write_json
from interns1pro_jax.train.metrics import read_records, replace

BASE, UNEXPANDED, INITIAL = "base", "unexpanded", "initial.json"
_PACKAGES = ("jax", "flax", "optax", "numpy")
_COPIES = {
    "weights_cosine": "cosine of copies' weights",
    "router_overlap": "tokens that copies share (Jaccard)",
    "output_difference": "difference of copies' outputs",
}

Curve = Mapping[str, Any]


def write(workdir: Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """`study.json`: every evaluation of every arm and seed; `study.csv`, `study.md`: means and deviations; `study.png`: curves."""
    runs = {arm: [curve(workdir / f"seed_{seed}" / arm) for seed in seeds] for arm in arms}
    base = curve(workdir / BASE)
    versions = {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    facts = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "seeds": list(seeds)}
    write_json(workdir / "study.json", facts | {"base": base, "arms": runs})
    lines = table(runs)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    replace(workdir / "study.csv", out.getvalue().encode())
    replace(workdir / "study.md", markdown(lines).encode())
    figure = draw(base, runs)
    figure.savefig(workdir / "study.png", dpi=110)


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
    return None if value is None or not np.isfinite(value) else value


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


def table(runs: Mapping[str, Sequence[Curve]]) -> list[list[str]]:
    """A header, and a line for each arm: mean and standard deviation over the seeds; "" where a quantity was not measured."""
    lines = [["arm", *_COLUMNS, "loss at the end, less unexpanded"]]
    reference = np.array([run["loss"][-1] for run in runs[UNEXPANDED]])
    for arm, curves in runs.items():
        values = [[run[name][at] if name in run else None for run in curves] for name, at in _COLUMNS.values()]
        values.append((np.array([run["loss"][-1] for run in curves]) - reference).tolist())
        lines.append([arm, *map(_cell, values)])
    return lines


def _cell(of_seeds: Sequence[float | None]) -> str:
    known = [value for value in of_seeds if value is not None]
    if not known:
        return ""
    return f"{np.mean(known):.4f}" + (f" ± {np.std(known, ddof=1):.4f}" if len(known) > 1 else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return head + "| --- |" + " ---: |" * (len(lines[0]) - 1) + "\n" + "".join(body)


def draw(base: Curve, runs: Mapping[str, Sequence[Curve]]) -> Figure:
    """Held-out loss before and after, and how the copies grow apart; bands are a standard deviation over the seeds."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    colours = {arm: f"C{i}" for i, arm in enumerate(runs)}
    before = axes[0, 0]
    before.plot(base["step"], base["loss"], "black")
    before.set(title="Before", xlabel="steps", ylabel="held-out loss (nats per token)")
    after, bars = axes[0, 1], axes[0, 2]
    for arm, curves in runs.items():
        _band(after, curves, "loss", colours[arm], arm)
    after.set(title="After: expanded, and trained on", xlabel="steps after expansion", ylabel="held-out loss (nats per token)")
    after.legend(fontsize=8)
    reference = np.array([run["loss"][-1] for run in runs[UNEXPANDED]])
    differences = {arm: np.array([run["loss"][-1] for run in curves]) - reference for arm, curves in runs.items()}
    bars.barh(
        list(differences),
        [x.mean() for x in differences.values()],
        xerr=[x.std(ddof=1) if len(x) > 1 else 0 for x in differences.values()],
        color=list(colours.values()),
    )
    bars.invert_yaxis()
    bars.axvline(0, color="black", lw=0.8)
    bars.set(title="At the end, against training on unexpanded", xlabel="held-out loss, difference (lower is better)")
    for axis, (name, title) in zip(axes[1], _COPIES.items(), strict=True):
        for arm, curves in runs.items():
            if name in curves[0]:
                _band(axis, curves, name, colours[arm], arm)
        axis.set(title=title, xlabel="steps after expansion")
    return figure


def _band(axis: Any, curves: Sequence[Curve], name: str, colour: str, label: str) -> None:
    steps = curves[0]["step"]
    values = np.array([run[name] for run in curves], np.float64)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
    axis.plot(steps, mean, color=colour, label=label)
    axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
