"""The report as a picture: modelled time over the roofline, in its parts, ours beside the best peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.kernels.parts import Parts
from tools.kernels.report import Sum

_COLORS = {"useful": "#1f4e79", "granularity": "#7f9fbf", "padding": "#f2a541", "overhead": "#c0392b", "waiting": "#bdbdbd"}
_LEGEND = {
    "useful": "useful matrix-unit time",
    "granularity": "whole packs and tiles of rows",
    "padding": "other padding",
    "overhead": "filling, draining, scalar code",
    "waiting": "waiting for memory",
}


def draw(sums: Sequence[Sum], shown: Sequence[str], path: Path) -> None:
    """A panel per chip and kind of sizes, in it a pair of stacked bars per number of rows, one per kernel in `shown`; lines for the
    roofline, the least that any kernel can reach, and the limits to keep."""
    panels = list(dict.fromkeys((total.sizes, total.chip) for total in sums))
    kinds, chips = (list(dict.fromkeys(panel[place] for panel in panels)) for place in (0, 1))
    found = {(total.sizes, total.chip, total.rows, total.kernel): total for total in sums if not total.missing}
    figure = Figure(figsize=(5.2 * len(chips), 0.6 + 3.4 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(chips), sharey=True, squeeze=False)
    width = 0.8 / len(shown)
    for kind, chip in panels:
        axes = grid[kinds.index(kind)][chips.index(chip)]
        rows = list(dict.fromkeys(total.rows for total in sums if (total.sizes, total.chip) == (kind, chip)))
        for x, count in enumerate(rows):
            for place, kernel in enumerate(shown):
                if total := found.get((kind, chip, count, kernel)):
                    _bar(axes, x + (place - (len(shown) - 1) / 2) * width, 0.92 * width, total, f"{kernel}\n{total.ratio:.3f}")
                    axes.hlines(total.least_ratio, x - 0.45, x + 0.45, color="black", linewidth=1)
                    if total.bar:
                        axes.hlines(total.bar, x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(rows)), [f"{count:,} rows" for count in rows])
        axes.set_title(f"{chip}, sizes {kind!r}", fontsize="medium")
        axes.margins(y=0.15)
    for row in grid:
        row[0].set_ylabel("modelled time / roofline")
    handles = [grid[0][0].bar(0, 0, color=color, label=_LEGEND[name]) for name, color in _COLORS.items()]
    (least,) = grid[0][0].plot([], [], color="black", label="least that any kernel can reach")
    (bar,) = grid[0][0].plot([], [], color="black", linestyle="--", label="to keep")
    figure.legend(handles=[*handles, least, bar], loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=100)


def _bar(axes, x: float, width: float, total: Sum, text: str) -> None:  # type: ignore[no-untyped-def]
    bottom = 0.0
    for name in Parts._fields:
        height = getattr(total.parts, name) / total.roofline
        axes.bar(x, height, width, bottom, color=_COLORS[name])
        bottom += height
    axes.text(x, bottom + 0.01, text, ha="center", va="bottom", fontsize="x-small", bbox={"color": "white", "pad": 0.5, "alpha": 0.8})
