"""A compiled training step as a picture: memory of a device beside its limit, and where the modelled time goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interns1pro_jax.flops import GIB
from interns1pro_jax.train.step_report import StepReport

_MEMORY = {
    "parameters": "#1f4e79",
    "optimizer": "#2e86ab",
    "gradients": "#7fb7be",
    "batch": "#b8b8b8",
    "kept": "#f2c14e",
    "working": "#f78154",
    "code": "#5f5f5f",
}
_TIMES = {"XLA": "#2e86ab", "kernels": "#1f4e79", "waiting": "#d1495b"}


def draw(report: StepReport, path: Path) -> None:
    """Writes the picture of one step."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    memory, times = figure.subplots(1, 2, width_ratios=(1, 1))
    draw_memory(memory, [report], [""])
    if report.times is None:
        times.set_axis_off()
        times.text(0.5, 0.5, "no times: no model of this hardware", ha="center")
    else:
        draw_times(times, [report], [""])
    figure.suptitle(report.title)
    figure.savefig(path, dpi=120)


def draw_memory(axes: Axes, reports: Sequence[StepReport], names: Sequence[str]) -> None:
    """Stacked bars of what a device holds, one for each report, and a tick at its limit."""
    places = range(len(reports))
    left = [0.0] * len(reports)
    for part, colour in _MEMORY.items():
        sizes = [dataclasses.asdict(report.memory)[part] / GIB for report in reports]
        axes.barh(places, sizes, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, report in enumerate(reports):
        if report.hbm:
            axes.plot([report.hbm / GIB] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_yticks(places, names)
    axes.set_xlabel("GiB of a device (line: limit)")
    axes.set_title("HBM, compiled")
    axes.legend(fontsize=7, ncols=4, loc="lower center")
    axes.set_ylim(len(reports) - 0.1, -0.6)


def draw_times(axes: Axes, reports: Sequence[StepReport], names: Sequence[str]) -> None:
    """Stacked bars of a step's modelled time, with thin ones below for HBM and the links of each set of axes."""
    for place, report in enumerate(reports):
        assert report.times is not None and report.bandwidth is not None and report.step_seconds is not None and report.mfu is not None
        parts = {"XLA": report.times.xla, "kernels": report.times.kernels, "waiting": report.times.waiting}
        left = 0.0
        for part, seconds in parts.items():
            axes.barh(place, seconds, left=left, color=_TIMES[part], height=0.4, label=part if place == 0 else None)
            left += seconds
        axes.text(report.step_seconds, place, f" {report.mfu:.0%} MFU", va="center", fontsize=8)
        busy = {"HBM": report.traffic / report.bandwidth} | {"+".join(key): value for key, value in report.times.links.items()}
        for index, (name, seconds) in enumerate(busy.items()):
            if seconds > 0.02 * report.step_seconds:
                axes.barh(place + 0.27 + 0.09 * index, seconds, color="#b8b8b8", height=0.07)
                axes.text(seconds, place + 0.27 + 0.09 * index, f" {name}", va="center", fontsize=5)
    axes.set_yticks(range(len(reports)), names)
    axes.margins(x=0.15)
    axes.set_xlabel("seconds (grey: HBM and links by themselves)")
    axes.set_title("One step, modelled")
    axes.legend(fontsize=7, ncols=3, loc="upper right")
    axes.set_ylim(len(reports) - 0.3, -0.6)
