"""Compiles the training step of every recipe for TPUs and writes what they need on one page, beside what others publish.

    python -m tools.pods_report [--output docs/pods_report.md] [--recipes pretrain_v5p_512 pretrain_tpu7x_256]

Each recipe is compiled by `experiments.launch --compile_only` in a process of its own: several minutes and 4 GB each. The compiled programs
stay in `--keep`, so that a program that did not change is not compiled again, and the figures beside the page, one JSON file for each
recipe, or why there are none. `--page_only` takes what is there, and the page says so.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from interns1pro_jax.flops import GIB
from interns1pro_jax.train.step_picture import draw_memory, draw_times
from interns1pro_jax.train.step_report import SMALL, StepReport

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "recipes"
_INCLUDE = re.compile(r"^include '([^']+)'", re.MULTILINE)

# Published or compiled figures of others, with their sources.
RECIPES_OF_MAXTEXT = "AI-Hypercomputer/tpu-recipes"
COMPILED_MAXTEXT = "MaxText e591f30c, compiled"
PEERS = (
    ("MaxText, Qwen3-235B (128 experts, random routing), 256 tpu7x", "measured", "27.3 %", "4,246", "", RECIPES_OF_MAXTEXT),
    ("MaxText, DeepSeek-V3, 256 tpu7x", "measured", "26.6 %", "2,446", "", RECIPES_OF_MAXTEXT),
    ("MaxText, DeepSeek-V3 (capacity 1.0: drops tokens), 512 v5p", "measured", "33.2 %", "542", "", RECIPES_OF_MAXTEXT),
    ("MaxText, our text shape, bf16 state, 1,024 v5p, 4,096 tokens/chip", "XLA's estimate", "29 %", "", "15.2", COMPILED_MAXTEXT),
    ("MaxText, our text shape, bf16 state, 1,024 v5p, 16,384 tokens/chip", "", "", "", "33.7", COMPILED_MAXTEXT),
    ("MaxText, our text shape, bf16 state, 256 v6e", "", "", "", "33.5 of temporaries: does not fit", COMPILED_MAXTEXT),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/pods_report.md"), help="the page; picture and figures lie beside it")
    parser.add_argument("--recipes", nargs="*", help="names; default all for TPUs")
    parser.add_argument("--keep", type=Path, default=Path("runs/pods_report"), help="where compiled programs stay (%(default)s)")
    parser.add_argument("--page_only", action="store_true", help="compile nothing; recipes without figures are left out")
    arguments = parser.parse_args(argv)
    console = Console()
    names = arguments.recipes or [path.stem for path in sorted(RECIPES.glob("*.gin")) if "MeshConfig.topology" in source(path)]
    reports, failures = {}, {}
    for number, name in enumerate(names, start=1):
        figures, reason = (arguments.output.with_suffix("") / f"{name}{suffix}" for suffix in (".json", ".txt"))
        if not arguments.page_only:
            console.print(f"[{number}/{len(names)}] {name}")
            figures.parent.mkdir(parents=True, exist_ok=True)
            if failure := compile_recipe(name, arguments.keep / name, figures):
                figures.unlink(missing_ok=True)
                reason.write_text(f"{failure}\n")
                console.print(failure)
            else:
                reason.unlink(missing_ok=True)
        if figures.is_file():
            reports[name] = StepReport.from_json(figures.read_text())
        elif reason.is_file():
            failures[name] = reason.read_text().strip()
    if not reports:
        sys.exit("error: no recipe could be compiled.")
    picture = arguments.output.with_suffix(".png")
    draw(reports, picture)
    arguments.output.write_text(page(reports, failures, arguments.page_only, picture.name))
    console.print(f"page: {arguments.output}")


def source(recipe: Path) -> str:
    """The text of a recipe with that of all it includes."""
    text = recipe.read_text()
    return text + "".join(source(ROOT / included) for included in _INCLUDE.findall(text))


def compile_recipe(name: str, workdir: Path, figures: Path) -> str | None:
    """Compiles a recipe, or finds its program in `workdir`, and writes its figures; what went wrong, or None."""
    command = [sys.executable, "-m", "experiments.launch", "--compile_only", "--gin_file", f"configs/recipes/{name}.gin"]
    done = subprocess.run([*command, "--workdir", str(workdir.absolute())], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return next((line for line in done.stderr.splitlines() if line.startswith("error")), done.stderr[-300:])
    figures.write_text((workdir / "step.json").read_text())
    return None


def draw(reports: dict[str, StepReport], path: Path) -> None:
    """Memory and times of all recipes in one picture."""
    figure = Figure(figsize=(15, 1.5 + 0.9 * len(reports)), layout="constrained")
    memory, times = figure.subplots(1, 2)
    draw_memory(memory, list(reports.values()), list(reports))
    timed = {name: report for name, report in reports.items() if report.times is not None}
    if timed:
        draw_times(times, list(timed.values()), ["" if len(timed) == len(reports) else name for name in timed])
    else:
        times.set_axis_off()
    figure.savefig(path, dpi=110)


def page(reports: dict[str, StepReport], failures: dict[str, str], page_only: bool, picture: str) -> str:
    """The page of all recipes."""
    versions = ", ".join(f"{name} {version}" for name, version in next(iter(reports.values())).versions.items())
    lines = [
        "# Recipes for TPUs, compiled",
        "",
        f"Made by `python -m tools.pods_report` on {datetime.date.today()} with {versions}. Memory, work and collectives are those of the "
        "compiled programs; times and MFU are modelled (`interns1pro_jax/train/timeline.py`), nothing was run on a TPU.",
        "",
        f"![memory and modelled times]({picture})",
        "",
        "## Memory of a device, GiB",
        "",
        "*Total* is what the program takes; *live* what lives at the same time, at most (XLA's `peak_memory_in_bytes`, as in MaxText's "
        "figures below).",
        "",
        "| recipe | devices | tokens per device | parameters | optimizer | gradients | kept of layers | working | other | total | "
        "of the limit | live |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in reports.items():
        m, share = r.memory, f"{r.memory.total / r.hbm:.1%}" if r.hbm else ""
        cells = (m.parameters, m.optimizer, m.gradients, m.kept, m.working, m.batch + m.code, m.total)
        sizes = " | ".join(f"{size / GIB:.2f}" for size in cells)
        lines.append(
            f"| {name} | {r.devices} | {r.tokens // r.devices:,} | {sizes} | {share} | {'' if r.live is None else f'{r.live / GIB:.2f}'} |"
        )
    lines += [
        "",
        "## Work and modelled time of a step",
        "",
        "| recipe | useful TFLOPs | computed | XLA s | kernels s | waiting s | HBM s | step s | modelled MFU | tokens/s/chip | bound by | "
        "compiled in s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, r in reports.items():
        if r.times is None or r.step_seconds is None or r.bandwidth is None:
            continue
        useful, computed = r.text_flops / r.devices / 1e12, (r.product_flops + r.kernel_flops) / 1e12
        seconds = (r.times.xla, r.times.kernels, r.times.waiting, r.traffic / r.bandwidth, r.step_seconds)
        rate = r.tokens / r.step_seconds / r.chips
        lines.append(
            f"| {name} | {useful:.0f} | {computed:.0f} | {' | '.join(f'{s:.2f}' for s in seconds)} | {r.mfu:.1%} | {rate:,.0f} | "
            f"{r.bound} | {r.seconds_to_compile:.0f} |"
        )
    lines += [
        "",
        f"## Collectives of a step (of {SMALL // 2**20} MiB or more)",
        "",
        "| recipe | collective | axes | origin | MiB each | times | asynchronous | links busy, modelled ms |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for name, r in reports.items():
        lines += [
            f"| {name} | {c.kind} | {c.axes} | {c.origin} | {c.bytes / 2**20:.0f} | {c.count} | {c.asynchronous} | {1e3 * c.seconds:.0f} |"
            for c in r.collectives
            if c.bytes >= SMALL
        ]
    if failures:
        lines += ["", "## What does not fit", "", *(f"* `{name}`: {reason}" for name, reason in failures.items())]
    lines += [
        "",
        "## Others",
        "",
        "| system | | MFU | tokens/s/chip | HBM GiB per chip | source |",
        "|---|---|---:|---:|---:|---|",
        *(f"| {' | '.join(peer)} |" for peer in PEERS),
        "",
        "MaxText's DeepSeek and Qwen figures are of other models; the compiled ones are of our text model's shape with its own router.",
    ]
    if page_only:
        lines += ["", "Written from figures of an earlier run (`--page_only`); the code may have changed since."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
