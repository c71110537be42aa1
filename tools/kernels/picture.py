"""The report as a picture: modelled time over the roofline, bars side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.kernels.report import BARS, Sum


def draw(sums: Sequence[Sum], path: Path) -> None:
    """A panel per chip, in it bars per number of rows and sizes, one per kernel; lines for the roofline and the limits to keep."""
    chips = list(dict.fromkeys(total.chip for total in sums))
    kernels = list(dict.fromkeys(total.kernel for total in sums))
    figure = Figure(figsize=(5.5 * len(chips), 4.5), layout="constrained")
    panels = figure.subplots(1, len(chips), sharey=True, squeeze=False)[0]
    for panel, chip in zip(panels, chips, strict=True):
        cells = list(dict.fromkeys((total.rows, total.sizes) for total in sums if total.chip == chip))
        ratios = {(total.rows, total.sizes, total.kernel): total.ratio for total in sums if total.chip == chip and not total.missing}
        width = 0.8 / len(kernels)
        for place, kernel in enumerate(kernels):
            shown = [(x, ratios[*cell, kernel]) for x, cell in enumerate(cells) if (*cell, kernel) in ratios]
            offsets = [x + (place - (len(kernels) - 1) / 2) * width for x, _ in shown]
            panel.bar(offsets, [ratio for _, ratio in shown], width, label=kernel, color=f"C{place}")
        for x, (rows, _) in enumerate(cells):
            if rows in BARS:
                panel.hlines(BARS[rows], x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1)
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set_xticks(range(len(cells)), [f"{rows:,}\n{sizes}" for rows, sizes in cells])
        panel.set_title(chip)
        panel.set_xlabel("rows, sizes of groups")
    panels[0].set_ylabel("modelled time / roofline (dashed: to keep)")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
