"""The report at the end of a run: `report.md` with its pictures, from the run's records and what the caller measured."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from interns1pro_jax.train.evaluation import GroupLoss
from interns1pro_jax.train.journal import LOST, Goodput, goodput, read_journal
from interns1pro_jax.train.metrics import JSON_LINES, read_records, replace

_PACKAGES = ("interns1pro_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SMOOTHING = 0.9  # of the training loss: weight of the past at each step
OPERATIVE_CONFIG, SAMPLES = "operative_config.gin", "samples"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The loss on all held-out documents, in nats per token, and that of a unigram model on exactly the same `tokens`."""

    loss: float
    unigram_loss: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class CaptionLoss:
    """Mean loss (nats per token) of the captions of held-out media: as they are, without the medium, with another one's medium."""

    true: float
    removed: float
    swapped: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """Something the model wrote. `prompt` may say what was shown; `reference` is what a person wrote, if anyone did."""

    prompt: str
    generated: str
    reference: str | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What a report needs beside the run's records. Parts that are None or empty are left out.

    Attributes:
      title: one line.
      summary: a paragraph in Markdown: what was trained on what.
      facts: rows of the table of numbers that only the caller knows (parameters, mesh, data).
      held_out: the evaluation of the trained model; the records have evaluations of a part of the held-out data.
      captions: by kind of medium.
      groups: losses of the trained model by source and kind of document (`train.evaluation`).
      expert_load: [MoE layers, experts], assignments as counts or shares.
      router_groups: groups of the experts, contiguous.
      rows_per_device: expert rows that each device of the expert axis computed for one batch and layer.
      operative_config: text of the configuration as it was used.
    """

    title: str
    summary: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    held_out: HeldOut | None = None
    captions: Mapping[str, CaptionLoss] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, GroupLoss] = dataclasses.field(default_factory=dict)
    samples: Sequence[Sample] = ()
    expert_load: np.ndarray | None = None
    router_groups: int = 1
    rows_per_device: Sequence[int] | None = None
    operative_config: str = ""


def write_report(workdir: Path, data: ReportData) -> Path:
    """Writes `report.md`, its PNG files and `operative_config.gin` to `workdir`, and returns the path of the report.

    Raises:
      FileNotFoundError: the run has no records there.
    """
    records = read_records(workdir)
    if not records:
        raise FileNotFoundError(f"{workdir / JSON_LINES} has no records; write the report after training in the same workdir.")
    parts = [f"# {data.title}", data.summary, "## Numbers", _table(("", ""), _numbers(records, data))]
    if data.captions:
        rows = [(kind, *(f"{x:.3f}" for x in dataclasses.astuple(loss))) for kind, loss in data.captions.items()]
        parts += ["## What the media are worth", "Loss of captions in nats per token; it should grow to the right of the first column."]
        parts.append(_table(("medium", "its own medium", "medium removed", "another's medium"), rows))
    parts += ["## Loss", _picture(workdir, "loss.png", _loss(records, data.held_out))]
    by_group = sorted({name for record in records for name in record if name.startswith(("eval/source/", "eval/kind/"))})
    if by_group:
        rows = [(name, f"{group.loss:.4f}", f"{group.tokens:,}") for name, group in data.groups.items() if name != "all"]
        parts += ["### By source and kind of document", _table(("held-out documents", "loss", "tokens"), rows) if rows else ""]
        parts.append(_picture(workdir, "loss_by_group.png", _by_group(records, by_group)))
    parts.append(_picture(workdir, "optimizer.png", _optimizer(records)))
    if data.rows_per_device is not None:
        parts += ["## Rows per device", "Equal by construction: each device holds a whole number of router groups."]
        parts.append(_picture(workdir, "rows_per_device.png", _rows(data.rows_per_device)))
    if any(record.get("router/dead_experts") is not None for record in records):
        parts += [
            "## Health of the routers",
            "Experts that no token of a batch chose, and how evenly the worst group is used (1: evenly).",
        ]
        parts.append(_picture(workdir, "router_health.png", _router_health(records)))
    if data.expert_load is not None:
        parts += ["## Load of the experts", "Assignments of each expert relative to the mean of its layer; lines separate router groups."]
        parts.append(_picture(workdir, "expert_load.png", _load(data.expert_load, data.router_groups)))
    if journal := read_journal(workdir):
        account = goodput(journal)
        parts += ["## Where the time went", f"Goodput {account.share:.1%}: the share of steps that count, over {account.starts} start(s)."]
        rows = [(phase, f"{seconds:,.1f}", f"{seconds / account.total:.1%}") for phase, seconds in _phases(account)]
        parts += [_table(("", "seconds", "share"), rows), _picture(workdir, "goodput.png", _time(account))]
    if data.samples:
        parts.append("## Samples")
        for sample in data.samples:
            parts += ["Prompt:", _fenced(sample.prompt), "Generated:", _fenced(sample.generated)]
            if sample.reference is not None:
                parts += ["Reference:", _fenced(sample.reference)]
    if data.operative_config:
        (workdir / OPERATIVE_CONFIG).write_text(data.operative_config)
        parts += ["## Configuration", f"As used, also in [{OPERATIVE_CONFIG}]({OPERATIVE_CONFIG}):", _fenced(data.operative_config)]
    parts += ["## Environment", _table(("", ""), environment().items())]
    path = workdir / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def save_samples(workdir: Path, step: int, samples: Sequence[Sample]) -> None:
    """Keeps what the model wrote after a step, in `samples/`; the first process writes."""
    if jax.process_index() == 0:
        (workdir / SAMPLES).mkdir(exist_ok=True)
        content = json.dumps([dataclasses.asdict(sample) for sample in samples], indent=1, ensure_ascii=False)
        replace(workdir / SAMPLES / f"{step:08d}.json", content.encode())


def read_samples(workdir: Path, step: int) -> list[Sample]:
    """What the model wrote after a step; nothing where nothing was kept."""
    path = workdir / SAMPLES / f"{step:08d}.json"
    return [Sample(**sample) for sample in json.loads(path.read_text())] if path.exists() else []


def environment() -> dict[str, str]:
    """Versions and devices, for reports and logs."""
    devices = jax.devices()
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return versions | {"devices": f"{len(devices)} x {devices[0].device_kind}", "host": f"{platform.machine()}, {platform.system()}"}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"


def _numbers(records: Sequence[Mapping[str, Any]], data: ReportData) -> list[tuple[str, str]]:
    last = records[-1]
    rows = [("steps", f"{last['step']:,}"), ("tokens with a loss", f"{last['tokens_seen']:,}")]
    speeds = [r["tokens_per_second"] for r in records if r.get("tokens_per_second") is not None]
    if speeds:
        rows.append(("tokens/s, median", f"{np.median(speeds):,.0f}"))
    _, shares = _column(records, "mfu")
    rows.append(("MFU, median", f"{100 * np.median(shares):.3g} %" if len(shares) else f"no peak known for {jax.devices()[0].device_kind}"))
    _, losses = _column(records, "loss")
    rows.append(("training loss, mean of the last tenth", f"{losses[-max(len(losses) // 10, 1) :].mean():.4f}" if len(losses) else "none"))
    _, validation = _column(records, "eval/loss")
    if len(validation):
        rows.append(("validation loss, last during training (a part of the held-out data)", f"{validation[-1]:.4f}"))
    if data.held_out is not None:
        rows.append((f"validation loss, all {data.held_out.tokens:,} held-out tokens", f"{data.held_out.loss:.4f}"))
        rows.append(("loss of a unigram model on the same tokens", f"{data.held_out.unigram_loss:.4f}"))
    rows.append(("bad steps, not applied", str(sum(r["applied"] == 0 for r in records))))
    return [*rows, *data.facts.items()]


def _column(records: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have this metric as a finite number."""
    pairs = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average without the bias of its start."""
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = _SMOOTHING * total + value, _SMOOTHING * weight + 1
        result.append(total / weight)
    return np.asarray(result)


def _plot(width: float, height: float, ylabel: str, xlabel: str = "step") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss(records: Sequence[Mapping[str, Any]], held_out: HeldOut | None) -> Figure:
    figure, axes = _plot(8, 4, "loss (nats per token)")
    steps, losses = _column(records, "loss")
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="C0", label="training (smoothed)")
    steps, losses = _column(records, "eval/loss")
    if len(steps):
        axes.plot(steps, losses, "o-", color="C1", markersize=4, label="validation, a part of the held-out data")
    if held_out is not None:
        axes.plot(records[-1]["step"], held_out.loss, "D", color="C3", markersize=5, label="validation, all held-out data")
        axes.axhline(held_out.unigram_loss, color="0.4", linestyle="--", label="unigram model, all held-out data")
    axes.legend(edgecolor="none")
    return figure


def _by_group(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    figure, axes = _plot(8, 4, "held-out loss (nats per token)")
    for name in names:
        style = "o-" if name.startswith("eval/source/") else "s--"
        axes.plot(*_column(records, name), style, markersize=3, label=name.removeprefix("eval/"))
    axes.legend(edgecolor="none", fontsize=8, ncols=2)
    return figure


def _optimizer(records: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = _plot(8, 3, "learning rate")
    axes.plot(*_column(records, "learning_rate"), color="C2")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(*_column(records, "grad_norm"), color="C3", alpha=0.5, linewidth=0.8)
    other.set(ylabel="gradient norm before clipping", yscale="log")
    axes.yaxis.label.set_color("C2")
    other.yaxis.label.set_color("C3")
    return figure


def _router_health(records: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = _plot(8, 3, "dead experts (%)")
    steps, dead = _column(records, "router/dead_experts")
    axes.plot(steps, 100 * _smooth(dead), color="C3")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    steps, entropy = _column(records, "router/group_entropy_min")
    other.plot(steps, _smooth(entropy), color="C0")
    other.set(ylabel="entropy of the worst group", ylim=(0, 1.02))
    axes.yaxis.label.set_color("C3")
    other.yaxis.label.set_color("C0")
    return figure


def _phases(account: Goodput) -> list[tuple[str, float]]:
    """Those that took any time, the losses last."""
    return sorted(((phase, s) for phase, s in account.seconds.items() if s > 0), key=lambda item: item[0] in ("rewound", LOST))


def _time(account: Goodput) -> Figure:
    figure, axes = _plot(8, 1.6, "", "seconds")
    left = 0.0
    for phase, seconds in _phases(account):
        axes.barh(0, seconds, left=left, label=phase)
        left += seconds
    axes.set_yticks([])
    axes.legend(ncols=8, fontsize=8, edgecolor="none", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _rows(rows: Sequence[int]) -> Figure:
    figure, axes = _plot(6, 3, "expert rows per layer", "device of the expert axis")
    axes.bar_label(axes.bar(range(len(rows)), rows, color="C0"), fontsize=8)
    axes.set_xticks(range(len(rows)))
    return figure


def _load(load: np.ndarray, groups: int) -> Figure:
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)
    figure, axes = _plot(8, max(2.0, min(8.0, 1 + 0.25 * len(load))), "MoE layer", "expert")
    image = axes.imshow(relative, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
    for group in range(1, groups):
        axes.axvline(group * load.shape[1] / groups - 0.5, color="white", linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="relative load")
    return figure


def _picture(workdir: Path, name: str, figure: Figure) -> str:
    figure.savefig(workdir / name, dpi=120)
    return f"![{Path(name).stem.replace('_', ' ')}]({name})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str) -> str:
    """A code block that `text` cannot end, whatever the model wrote."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
