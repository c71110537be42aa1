"""The report as text: tables in Markdown, and everything as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.kernels.parts import Parts
from tools.kernels.report import Compiled, Hot, Modelled, Report, Sum

BEST_PEER = "best peers"


def markdown(report: Report, sums: Sequence[Sum], ours: str, assumptions: Mapping[str, str]) -> str:
    """All tables, the shortest first, with what was assumed on top."""
    sections = ["# Kernel report", "\n".join(f"* {name}: {text}" for name, text in assumptions.items())]
    if sums:
        sections += [f"## Together: {', '.join(sums[0].products)}", _SUMS_NOTE, sums_table(sums, ours)]
        sections += ["### What the time is made of", _PARTS_NOTE, parts_table(sums, ours)]
    if report.modelled:
        sections += ["## Modelled times", _MODEL_NOTE, modelled_table(report.best())]
    sections += ["## Compiled kernels", _COMPILED_NOTE, compiled_table(report.compiled)]
    if failed := [record for record in report.compiled if record.error]:
        sections += ["## Not compiled or not modelled", "\n".join(f"* {_of(record)}: {record.error}" for record in failed)]
    return "\n\n".join(sections) + "\n"


_SUMS_NOTE = (
    "Milliseconds, and times the roofline. Least: what no kernel can do better, since matrix units take whole packs of rows and contract "
    "whole tiles of them. A bar below it is out of reach."
)
_PARTS_NOTE = (
    "Per cent of the roofline; they add up to the modelled time. Useful: the matrix units at full use on the rows that exist. "
    "Granularity: what no kernel can avoid besides. Padding: other rows, and work that the other cores do not share. Overhead: filling "
    "and draining the matrix units, code between straight runs of products. Waiting: for transfers."
)
_MODEL_NOTE = (
    "HBM: all bytes moved. From useful to waiting milliseconds, of the core that ends last; they add up to the modelled time. Roofline: "
    "matrix units at full use (MXU), or every operand moved once (HBM), whichever takes longer. Least: of any kernel, over the roofline."
)
_COMPILED_NOTE = (
    "Of regions that hold products: cycles of one pass / cycles of its products at full use of the matrix units / the ratio; and "
    "spills/fills. Of regions with the same products the slowest is shown. Code is that of the whole program less that of an empty one."
)


def sums_table(sums: Sequence[Sum], ours: str) -> str:
    """A line per chip, rows and sizes; kernels side by side as milliseconds and times the roofline."""
    kernels = list(dict.fromkeys(total.kernel for total in sums))
    rows = []
    for (chip, count, sizes), by_kernel in _cells(sums).items():
        mine, peer = by_kernel.get(ours), by_kernel.get(BEST_PEER)
        bound = max(by_kernel.values(), key=lambda total: len(total.missing) == 0)
        shown = [_total(by_kernel.get(kernel)) for kernel in kernels]
        least = f"{bound.least_ratio:.3f}x"
        rows.append([chip, f"{count:,}", sizes, f"{bound.roofline * 1e3:.3f}", least, *shown, verdict(mine, peer)])
    return _table(["chip", "rows", "sizes", "roofline ms", "least", *kernels, "bar"], rows)


def parts_table(sums: Sequence[Sum], ours: str) -> str:
    """A line per chip, rows, sizes, and ours or the best peers."""
    rows = []
    for (chip, count, sizes), by_kernel in _cells(sums).items():
        for total in (by_kernel[name] for name in (ours, BEST_PEER) if name in by_kernel and not by_kernel[name].missing):
            parts = [f"{100 * part / total.roofline:.1f}" for part in total.parts]
            rows.append([chip, f"{count:,}", sizes, total.kernel, *parts, f"{100 * total.ratio:.1f}"])
    return _table(["chip", "rows", "sizes", "kernel", *Parts._fields, "time"], rows)


def _cells(sums: Sequence[Sum]) -> dict[tuple[str, int, str], dict[str, Sum]]:
    cells: dict[tuple[str, int, str], dict[str, Sum]] = {}
    for total in sums:
        cells.setdefault((total.chip, total.rows, total.sizes), {})[total.kernel] = total
    return cells


def verdict(mine: Sum | None, peer: Sum | None) -> str:
    """Whether our kernels keep the bar and beat the best peers."""
    if mine is None or mine.missing:
        return "-"
    kept = "none"
    if mine.bar:
        kept = f"{mine.bar} {'met' if mine.ratio <= mine.bar else 'MISSED' if mine.least_ratio <= mine.bar else 'out of reach'}"
    if peer is None or peer.missing:
        return kept
    return f"{kept}, {'faster' if mine.time < peer.time else 'NOT FASTER'} than {peer.kernel}"


def _total(total: Sum | None) -> str:
    if total is None:
        return "-"
    if total.missing:
        return f"no {', '.join(total.missing)}"
    return f"{total.time * 1e3:.3f} ({total.ratio:.3f}x, work {total.work:.3f}x)"


def modelled_table(records: Iterable[Modelled]) -> str:
    columns: dict[str, Callable[[Modelled], str]] = {
        "chip": lambda record: record.chip,
        "rows": lambda record: f"{record.rows:,}" if record.rows else "",
        "sizes": lambda record: record.sizes,
        "kernel": lambda record: record.case,
        "HBM GB": lambda record: f"{record.bytes / 1e9:.3f}",
        **{name: functools.partial(_part, name) for name in Parts._fields},
        "modelled ms": lambda record: f"{record.time * 1e3:.3f}",
        "roofline ms": lambda record: f"{record.roofline * 1e3:.3f} ({record.bound})",
        "ratio": lambda record: f"{record.ratio:.3f}x",
        "least": lambda record: f"{record.least_time / record.roofline:.3f}x",
    }
    return _table(list(columns), ([text(record) for text in columns.values()] for record in records))


def _part(name: str, record: Modelled) -> str:
    return f"{getattr(record.parts, name) * 1e3:.3f}"


def compiled_table(records: Iterable[Compiled]) -> str:
    columns: dict[str, Callable[[Compiled], str]] = {
        "chip": lambda record: record.chip,
        "kernel": lambda record: record.case,
        "VMEM MiB": lambda record: f"{record.vmem / 2**20:.1f}",
        "code MiB": lambda record: f"{record.code / 2**20:.2f}",
        "bundles": lambda record: f"{record.bundles:,}",
        "cycles/ideal/use": lambda record: "; ".join(
            f"{hot.cycles}/{hot.matrix_cycles:.0f}/{hot.matrix_use:.3f}" for hot in _kinds(record)
        ),
        "spills/fills": lambda record: "; ".join(f"{hot.spills}/{hot.fills}" for hot in _kinds(record)),
        "compile s": lambda record: f"{record.seconds:.1f}",
    }
    return _table(list(columns), ([text(record) for text in columns.values()] for record in records if not record.error))


def _kinds(record: Compiled) -> list[Hot]:
    """Of regions with the same matrix work (variants for masks, mostly) the slowest; most work first."""
    slowest: dict[float, Hot] = {}
    for hot in sorted(record.hot, key=lambda hot: hot.cycles):
        slowest[hot.matrix_cycles] = hot
    return sorted(slowest.values(), key=lambda hot: -hot.matrix_cycles)


def as_json(report: Report, sums: Sequence[Sum], assumptions: Mapping[str, str]) -> str:
    """Everything, every tiling included; seconds and bytes."""
    records: dict[str, Sequence[Compiled | Modelled | Sum]] = {"compiled": report.compiled, "modelled": report.modelled, "sums": sums}
    return json.dumps(
        {"assumptions": dict(assumptions)} | {name: [_plain(record) for record in of] for name, of in records.items()}, indent=1
    )


def _plain(record: Compiled | Modelled | Sum) -> dict[str, Any]:
    found = dataclasses.asdict(record)
    return found | {"parts": record.parts._asdict()} if isinstance(record, Modelled | Sum) else found


def _of(record: Compiled) -> str:
    return f"{record.chip} {record.case}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
