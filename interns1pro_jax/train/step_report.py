"""What a compiled training step needs of every device, as numbers that people can read: memory, work, communication, modelled time."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.flops import GIB, Hardware, text_flops, tower_flops
from interns1pro_jax.footprint import kept_bytes
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.train import aot, hlo, hlo_cost
from interns1pro_jax.train.aot import Program
from interns1pro_jax.train.hlo import Collective
from interns1pro_jax.train.state import TrainState
from interns1pro_jax.train.step import StepConfig
from interns1pro_jax.train.timeline import FROM_HOST, TO_HOST, Player, Times

SMALL = 2**20  # collectives of fewer bytes are counted together


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a step; together they are what the compiler says.

    Attributes:
      parameters, optimizer: the state that stays between steps, by its shardings.
      batch: inputs, and what else is given to the step.
      gradients: of all parameters, by their shardings, in the dtype of the parameters.
      kept: what the backward pass finds of all layers: their inputs, and what the rematerialisation policy keeps of attention.
      working: the rest of the temporaries: gathered weights, activations of a layer, logits.
      code: the program.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    kept: int
    working: int
    code: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind, size and origin in a step, on one device.

    Attributes:
      bytes: of each, undivided. seconds: that the links need for all, modelled.
      asynchronous: how many of `count` go on while something else is computed.
    """

    kind: str
    axes: str
    origin: str
    bytes: int
    count: int
    asynchronous: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One training step on one device of a mesh.

    Attributes:
      tokens: of the whole batch. length: of a row. remat, moe_chunks: of its `StepConfig`.
      live: bytes that live at the same time, at most: `memory` without the gaps between them. hbm: that a device has.
      text_flops, tower_flops: useful FLOPs of the step on all devices (`interns1pro_jax.flops`).
      product_flops, kernel_flops: FLOPs that a device computes, recomputation included.
      traffic: bytes that a device moves in HBM.
      involuntary: warnings of the compiler that it copies an array to every device to reshard it.
      times: modelled; None where there is no model of the hardware.
    """

    title: str
    topology: str | None
    mesh: dict[str, int]
    tokens: int
    length: int
    remat: str
    moe_chunks: int
    memory: Memory
    live: int | None
    hbm: int | None
    text_flops: float
    tower_flops: float
    product_flops: float
    kernel_flops: float
    traffic: float
    collectives: tuple[CollectiveRow, ...]
    involuntary: int
    times: Times | None
    peak: float | None
    bandwidth: float | None
    devices_per_chip: int
    seconds_to_compile: float
    versions: dict[str, str]

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.mesh.values())))

    @property
    def chips(self) -> int:
        return self.devices // self.devices_per_chip

    @property
    def step_seconds(self) -> float | None:
        """Modelled: the schedule as played back, or all traffic of HBM, whichever takes longer."""
        if self.times is None or self.bandwidth is None:
            return None
        return max(self.times.step, self.traffic / self.bandwidth)

    @property
    def mfu(self) -> float | None:
        """Modelled: the decoder's useful FLOPs per second over the peak."""
        if self.step_seconds is None or self.peak is None:
            return None
        return self.text_flops / self.devices / self.step_seconds / self.peak

    @property
    def bound(self) -> str | None:
        """What the step spends most of its modelled time on."""
        if self.times is None or self.bandwidth is None:
            return None
        spent = {
            "computing": self.times.compute,
            "waiting for transfers": self.times.waiting,
            "HBM": max(0.0, self.traffic / self.bandwidth - self.times.step),
        }
        return max(spent, key=lambda name: spent[name])

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        if self.times is not None:
            content["times"]["links"] = {"+".join(axes): seconds for axes, seconds in self.times.links.items()}
        # For readers of the file; `from_json` leaves them out.
        derived = {"devices": self.devices, "chips": self.chips, "step_seconds": self.step_seconds, "mfu": self.mfu, "bound": self.bound}
        return json.dumps(content | {"hbm_total": self.memory.total} | derived, indent=1)

    @classmethod
    def from_json(cls, text: str) -> StepReport:
        """The report that `to_json` wrote."""
        content = json.loads(text)
        values = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        values["memory"] = Memory(**values["memory"])
        values["collectives"] = tuple(CollectiveRow(**row) for row in values["collectives"])
        if (times := values["times"]) is not None:
            links = {tuple(axes.split("+")): seconds for axes, seconds in times["links"].items()}
            values["times"] = Times(**(times | {"links": links}))
        return cls(**values)


def make_report(
    program: Program,
    mesh: Mesh,
    hardware: Hardware | None,
    *,
    title: str,
    topology: str | None,
    model: ModelConfig,
    row: RowSize,
    step: StepConfig,
    state: TrainState,
    batch: Batch,
) -> StepReport:
    """The report of a compiled training step.

    Args:
      program: the step, compiled for `mesh`.
      hardware: of its devices; None leaves out what is modelled.
      state, batch: abstract, with shardings; what the step was compiled for.
    """
    parsed = hlo.computations(program.text)
    products, kernels = hlo_cost.product_flops(parsed)
    player = Player(program.text, mesh, hardware) if hardware else None
    rows, length = batch.labels.shape
    return StepReport(
        title=title,
        topology=topology,
        mesh=dict(mesh.shape),
        tokens=rows * length,
        length=length,
        remat=step.remat,
        moe_chunks=step.moe_chunks,
        memory=_memory(program, mesh, model, step, state, batch),
        live=program.live,
        hbm=hardware.hbm if hardware else None,
        text_flops=3.0 * rows * length * text_flops(model.text, length),
        tower_flops=3.0 * rows * tower_flops(model, row),
        product_flops=products,
        kernel_flops=kernels,
        traffic=hlo_cost.traffic(parsed),
        collectives=tuple(_rows(program.collectives, player)),
        involuntary=program.warnings.count("Involuntary full rematerialization"),
        times=player.times() if player else None,
        peak=hardware.peak if hardware else None,
        bandwidth=hardware.bandwidth if hardware else None,
        devices_per_chip=hardware.devices_per_chip if hardware else 1,
        seconds_to_compile=program.seconds,
        versions=_versions(),
    )


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of (abstract) arrays."""

    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if isinstance(x.sharding, jax.sharding.NamedSharding) else x.shape
        return int(np.prod(shape)) * x.dtype.itemsize if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else 0

    return sum(size(x) for x in jax.tree.leaves(tree))


def _memory(program: Program, mesh: Mesh, model: ModelConfig, step: StepConfig, state: TrainState, batch: Batch) -> Memory:
    parameters, optimizer = shard_bytes(state.params), shard_bytes(state.opt_state)
    tokens = batch.labels.size // mesh.size // step.microbatches  # labels are whole rows, tokens are split further over `context`
    kept = kept_bytes(model.text, tokens, step.remat)
    resident = program.hbm - program.temporary - program.code
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=resident - parameters - optimizer,
        gradients=parameters,
        kept=kept,
        working=program.temporary - parameters - kept,
        code=program.code,
    )


def _rows(collectives: Sequence[Collective], player: Player | None) -> list[CollectiveRow]:
    """Equal collectives in one row, those that take longest first; the small ones of each kind together."""
    grouped: dict[tuple[str, str, str, int], list[Collective]] = {}
    for collective in collectives:
        small = collective.bytes < SMALL
        axes = "unknown" if collective.axes is None else "+".join(collective.axes)
        key = (collective.kind, "any" if small else axes, "small" if small else origin(collective), 0 if small else collective.bytes)
        grouped.setdefault(key, []).append(collective)
    rows = [
        CollectiveRow(
            kind,
            axes,
            name,
            size or max(c.bytes for c in found),
            sum(c.times for c in found),
            sum(c.times for c in found if c.asynchronous),
            sum(c.times * player.transfer(c) for c in found) if player else 0.0,
        )
        for (kind, axes, name, size), found in grouped.items()
    ]
    return sorted(rows, key=lambda row: (-row.seconds, -row.bytes * row.count))


def origin(collective: Collective) -> str:
    """The name of a collective in the source, and the pass that it belongs to."""
    if not collective.scope:
        return "made by the compiler"
    *outer, last = collective.scope.split("/")
    # The last part is JAX's own name of the operation; the scopes of the layers and the formula of a product say more.
    marks = ("_all_gather", "_reduce_scatter", "_all_to_all", "lm_head")
    named = [part for part in outer if part.endswith(marks) or "->" in part]
    directions = {"rematted_computation": "recomputed", "transpose(": "backward"}
    direction = next((word for mark, word in directions.items() if mark in collective.scope), "forward")
    return f"{'/'.join(named[-2:]) or last}, {direction}"


def wires(axes: tuple[str, ...]) -> str:
    """The name of what `Times.links` counts."""
    return axes[0] if axes in (TO_HOST, FROM_HOST) else f"links of {' + '.join(axes)}"


def _versions() -> dict[str, str]:
    packages = ("jax", "libtpu") if aot.can_compile() else ("jax",)
    return {package: importlib.metadata.version(package) for package in packages}


# Words ----------------------------------------------------------------------------------------------------------------


def markdown(report: StepReport) -> str:
    """The report as a page of Markdown."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    where = f"{report.chips} chips, topology {report.topology}" if report.topology else f"{report.devices} devices, no TPU"
    lines = [
        f"# {report.title}: compiled training step",
        "",
        f"{where}; mesh {mesh}; {report.tokens:,} tokens in a step, rows of {report.length:,}. "
        f"Compiled in {report.seconds_to_compile:.0f} s with {versions}. Nothing was run.",
        "",
        "| HBM of a device | GiB |",
        "|---|---:|",
    ]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in dataclasses.asdict(report.memory).items()]
    share = f" = {report.memory.total / report.hbm:.1%} of {report.hbm / GIB:.2f}" if report.hbm else ""
    lines += [f"| **total** | **{report.memory.total / GIB:.2f}**{share} |"]
    lines += [] if report.live is None else [f"| of it live at the same time, at most | {report.live / GIB:.2f} |"]
    lines += ["", "| work of a device in a step | |", "|---|---:|"]
    computed = report.product_flops + report.kernel_flops
    useful = (report.text_flops + report.tower_flops) / report.devices
    lines += [
        f"| useful TFLOPs, decoder + towers | {report.text_flops / report.devices / 1e12:.1f} + "
        f"{report.tower_flops / report.devices / 1e12:.1f} |",
        f"| computed TFLOPs (products; kernels' own: {report.kernel_flops / 1e12:.1f}) | {computed / 1e12:.1f} |",
        f"| computed / useful | {computed / useful:.2f} |",
        f"| GB moved in HBM | {report.traffic / 1e9:.0f} |",
        f"| involuntary rematerialisations | {report.involuntary} |",
    ]
    if report.times is not None and report.step_seconds is not None and report.bandwidth is not None:
        t = report.times
        lines += [
            "",
            "| modelled time of a step | ms |",
            "|---|---:|",
            f"| products and element-wise work of XLA | {1e3 * t.xla:.0f} |",
            f"| Pallas kernels | {1e3 * t.kernels:.0f} |",
            f"| waiting for transfers | {1e3 * t.waiting:.0f} |",
            f"| HBM, if it did nothing but move the bytes | {1e3 * report.traffic / report.bandwidth:.0f} |",
        ]
        lines += [f"| {wires(axes)} busy | {1e3 * seconds:.0f} |" for axes, seconds in t.links.items()]
        rate = report.tokens / report.step_seconds / report.chips
        lines += [
            f"| **step** | **{1e3 * report.step_seconds:.0f}** |",
            "",
            f"Modelled MFU {report.mfu:.1%}, {rate:,.0f} tokens per second and chip; most of the time goes to {report.bound}.",
        ]
    lines += [
        "",
        "| collective | axes | origin | MiB each | times | asynchronous | modelled ms |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.kind} | {row.axes} | {row.origin} | {row.bytes / 2**20:.1f} | {row.count} | {row.asynchronous} | {1e3 * row.seconds:.1f} |"
        for row in report.collectives
    ]
    return "\n".join([*lines, ""])
