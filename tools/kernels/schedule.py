"""Reads the static schedule of a TPU kernel from what libtpu dumps while it compiles.

A TensorCore issues one bundle of instructions a cycle, in order, and the compiler knows every latency but that of transfers. So
the cycles of a stretch of code are known at compile time, and only waiting for transfers is missing. Of each kernel libtpu dumps:

* `*-final_bundles.txt`: the instructions, one entry per bundle, with the addresses where control-flow regions start;
* `*-final_hlo-static-per-bundle-utilization.txt`: one row per bundle with the number of units of each kind in use;
* `*-pre-delay_hlo-static-per-bundle-utilization.txt`: the same, one row per *cycle*. The compiler's last pass folds empty bundles
  into a delay of the bundle before, which is not in the text, so bundles are not cycles. Without the columns that count occupancy
  instead of issue, the rows of both files are the same but for empty ones, and this gives each bundle its cycles.

A branch backwards closes a loop, [target, branch + its delay slots]; a branch forwards skips a region that runs under a condition.
They nest, and form a tree: of each region we know the cycles of one pass, but not how often it runs.

The first column (`MATMUL` in libtpu 0.0.52, `MXU` in 0.0.42 and 0.0.50; the same figures) counts matrix units in use in a cycle.
Its sum over the number of units is the cycles that the products would take at full use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:\s*(?:> ?)*\{")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"(?<!/)End region (\d+)")
_BRANCH = re.compile(r"\bsbr\.\w+ [^;]*?target = \$region(\d+)")
_DELAY_SLOTS = 4

# Columns that show issue, best first: a unit that stays busy for several cycles after an issue shows in its column's rows all the
# while, also in cycles that the final schedule folds away. Which units do depends on the chip.
_MATRIX = ("MATMUL", "MXU")
_OCCUPANCY = ({*_MATRIX, "MATPUSH", "XLU"}, {"EUP"}, {"VPOP"}, {"VALU"})


class ScheduleError(ValueError):
    """A dump that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a stretch of code holds; `matrix_cycles` is what its products would take with all matrix units in use."""

    bundles: int
    cycles: int
    matmuls: int
    matrix_cycles: float
    spills: int
    fills: int
    transfers: int

    @property
    def matrix_use(self) -> float:
        return self.matrix_cycles / self.cycles if self.cycles else 0.0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Region:
    """A loop's body, a stretch of code that runs under a condition, or a whole kernel: the bundles [start, end).

    Attributes:
      total: everything inside, each bundle once.
      own: the same without the regions inside: one pass in which no condition holds and no inner loop runs.
    """

    kind: str
    start: int
    end: int
    children: tuple[Region, ...]
    total: Counts

    @property
    def own(self) -> Counts:
        own = self.total
        for child in self.children:
            own -= child.total
        return own

    def walk(self) -> Iterator[Region]:
        """This region and all inside, in the order of the code."""
        yield self
        for child in self.children:
            yield from child.walk()

    def tree(self, indent: int = 0) -> str:
        """A line per region: where, one pass's own cycles, products, matrix use, spills/fills, transfers started."""
        own = self.own
        line = f"{'  ' * indent}{self.kind} [{self.start:#x}, {self.end:#x}) {own.cycles} cycles"
        if self.children:
            line += f" (with all inside {self.total.cycles})"
        if own.matmuls:
            line += f", {own.matmuls} matmuls = {own.matrix_cycles:.0f} matrix cycles, use {own.matrix_use:.3f}"
        if own.spills or own.fills:
            line += f", spills/fills {own.spills}/{own.fills}"
        if own.transfers:
            line += f", {own.transfers} transfers started"
        return "\n".join([line, *(child.tree(indent + 1) for child in self.children)])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one kernel, by its name in the compiled module."""

    name: str
    root: Region

    def hot_regions(self, least: float = 0.05) -> list[Region]:
        """The regions that hold products themselves, of at least a share `least` of the one with the most; in order of the code.
        Of a kernel without products its innermost loops."""
        holders = [region for region in self.root.walk() if region.own.matmuls]
        if not holders:
            return [
                region
                for region in self.root.walk()
                if region.kind == "loop" and not any(c.kind == "loop" for c in region.walk() if c is not region)
            ]
        most = max((region.own.matmuls for region in holders), default=0)
        return [region for region in holders if region.own.matmuls >= least * most]


def read_schedules(directory: Path) -> list[Schedule]:
    """The schedules of all Pallas kernels in a dump of one compilation (not those of XLA's own code around them).

    Raises:
      ScheduleError: a kernel's dump is incomplete or not understood.
    """
    found = []
    for path in sorted(directory.glob("*-schedule-analysis_final_bundles.txt")):
        match = re.fullmatch(r"(\d+-(.*))-\d+-schedule-analysis_final_bundles\.txt", path.name)
        if match is None:
            raise ScheduleError(f"{path.name}: expected NUMBER-KERNEL-PASS-schedule-analysis_final_bundles.txt.")
        with path.open(errors="replace") as file:
            head = file.read(8192)
        if f"%{match[2]} = " in head and 'custom_call_target="tpu_custom_call"' in head:
            found.append(_read(directory, match[1], match[2]))
    return found


def _read(directory: Path, prefix: str, name: str) -> Schedule:
    siblings = [path for path in directory.iterdir() if path.name.startswith(f"{prefix}-")]

    def sibling(ending: str) -> Path:
        found = [path for path in siblings if re.fullmatch(rf"\d+-{ending}", path.name[len(prefix) + 1 :])]
        if len(found) != 1:
            raise ScheduleError(f"kernel {name}: {len(found)} files *-{ending}, expected one.")
        return found[0]

    per_cycle = read_utilization(sibling(r"pre-delay_hlo-static-per-bundle-utilization\.txt"))
    per_bundle = read_utilization(sibling(r"final_hlo-static-per-bundle-utilization\.txt"))
    with sibling(r"final_bundles\.txt").open(errors="replace") as file:
        return Schedule(name, build_tree(list(read_bundles(file)), per_bundle, per_cycle))


@dataclasses.dataclass(frozen=True)
class Utilization:
    """Units in use, [rows, columns]; and how many of each kind there are."""

    columns: list[str]
    capacities: list[int]
    rows: np.ndarray

    def __getitem__(self, column: str) -> np.ndarray:
        return self.rows[:, self.columns.index(column)]

    @property
    def matrix_column(self) -> str:
        found = [column for column in _MATRIX if column in self.columns]
        if not found:
            raise ScheduleError(
                f"no column {' or '.join(_MATRIX)} among {self.columns}: this libtpu does not say when matrix units are in use."
            )
        return found[0]

    @property
    def matrix_units(self) -> int:
        return self.capacities[self.columns.index(self.matrix_column)]


def read_utilization(path: Path) -> Utilization:
    """A utilization file: a title, the columns' names, their capacities, a title, and the rows."""
    lines = path.read_text().splitlines()
    columns, capacities = [name.strip() for name in lines[1].split(",")], [int(number) for number in lines[2].split()]
    rows = np.array([line.split() for line in lines[4:] if line.strip()], np.int64).reshape(-1, len(columns))
    return Utilization(columns, capacities, rows)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One bundle of instructions: how many products and transfers it starts, regions that start and end here, targets of branches."""

    matmuls: int
    transfers: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    branches: tuple[int, ...]


def read_bundles(lines: Iterator[str]) -> Iterator[Bundle]:
    """The bundles of a `final_bundles` file; their addresses are their places."""
    entry: list[str] = []
    place = -1
    for line in lines:
        match = _BUNDLE.match(line)
        if match:
            if entry:
                yield _bundle("".join(entry))
            entry, place = [line], place + 1
            if int(match[1], 16) != place:
                raise ScheduleError(f"the bundle at place {place} has address {match[1]}.")
        elif entry:
            entry.append(line)
    if entry:
        yield _bundle("".join(entry))


def _bundle(text: str) -> Bundle:
    comments = _COMMENT.findall(text)
    code = _COMMENT.sub("", text)
    branches = tuple(int(name) for name in _BRANCH.findall(code))
    if len(branches) != code.count("sbr."):
        raise ScheduleError(f"a branch of unknown form in {text.strip()[:300]}.")
    starts = tuple(int(name) for comment in comments for name in _START.findall(comment))
    ends = tuple(int(name) for comment in comments for name in _END.findall(comment))
    transfers = code.count(" dma.") - code.count(" dma.done")
    return Bundle(code.count(" vmatmul."), transfers, starts, ends, branches)


def build_tree(bundles: list[Bundle], per_bundle: Utilization, per_cycle: Utilization) -> Region:
    """Puts cycles, counts and control flow together."""
    if len(bundles) != len(per_bundle.rows):
        raise ScheduleError(f"{len(bundles)} bundles, but {len(per_bundle.rows)} rows of utilization.")
    busy = np.append(0, np.cumsum(per_cycle[per_cycle.matrix_column]))
    first_cycle = np.append(_first_cycles(per_bundle, per_cycle), len(per_cycle.rows))

    def summed(values) -> np.ndarray:  # type: ignore[no-untyped-def]
        return np.append(0, np.cumsum(values))

    matmuls, transfers = summed([bundle.matmuls for bundle in bundles]), summed([bundle.transfers for bundle in bundles])
    spills, fills = summed(per_bundle["VSTORE:SPILL"]), summed(per_bundle["VLOAD:FILL"])

    def count(start: int, end: int) -> Counts:
        def between(sums: np.ndarray) -> int:
            return int(sums[end] - sums[start])

        cycles = between(first_cycle)
        matrix_cycles = int(busy[first_cycle[end]] - busy[first_cycle[start]]) / per_cycle.matrix_units
        return Counts(end - start, cycles, between(matmuls), matrix_cycles, between(spills), between(fills), between(transfers))

    return _nest(0, len(bundles), "kernel", sorted(_regions(bundles), key=lambda found: (found[0], -found[1], found[2])), count)


def _regions(bundles: list[Bundle]) -> set[tuple[int, int, str]]:
    """(start, end, kind) of what branches close or skip."""
    start_of: dict[int, int] = {}
    end_of: dict[int, int] = {}
    for address, bundle in enumerate(bundles):
        for name in bundle.starts:
            start_of.setdefault(name, address)
        for name in bundle.ends:
            end_of[name] = address + 1
    regions = set()
    for address, bundle in enumerate(bundles):
        if not bundle.branches:
            continue
        # Empty delay slots are folded away; then what follows starts earlier.
        slots_end = min(address + 1 + _DELAY_SLOTS, len(bundles))
        after = next((place for place in range(address + 1, slots_end) if bundles[place].starts), slots_end)
        for name in bundle.branches:
            if name in start_of:
                target = start_of[name]
            else:  # an empty region that is gone: regions are numbered in order, so what is skipped ends with the one before
                before = max((other for other in end_of if other < name and end_of[other] > after), default=None)
                if before is None:
                    raise ScheduleError(f"bundle {address:#x} branches to region {name}, which starts nowhere.")
                target = end_of[before]
            if target <= address:
                regions.add((target, after, "loop"))
            elif after < target:
                regions.add((after, target, "branch"))
    return regions


def _nest(start, end, kind, inside, count) -> Region:  # type: ignore[no-untyped-def]
    """Regions by containment; `inside` is sorted by start, outermost first."""
    children = []
    while inside:
        (first, last, inner_kind), *inside = inside
        last = min(last, end)
        within = [found for found in inside if found[0] < last]
        inside = inside[len(within) :]
        children.append(_nest(first, last, inner_kind, within, count))
    return Region(kind, start, end, tuple(children), count(start, end))


def _first_cycles(per_bundle: Utilization, per_cycle: Utilization) -> np.ndarray:
    """The cycle in which each bundle is issued."""
    dropped: set[str] = set()
    for columns in _OCCUPANCY:
        dropped |= columns
        kept = [i for i, column in enumerate(per_bundle.columns) if column not in dropped]
        bundle_rows, cycle_rows = per_bundle.rows[:, kept], per_cycle.rows[:, kept]
        bundles, cycles = np.flatnonzero(bundle_rows.any(1)), np.flatnonzero(cycle_rows.any(1))
        if np.array_equal(bundle_rows[bundles], cycle_rows[cycles]):
            break
    else:
        raise ScheduleError("the schedules before and after the folding of delays do not match.")
    # Bundles between two that match follow the first without delay; the wait is before the second.
    first = np.arange(len(per_bundle.rows))
    for bundle, next_bundle, cycle in zip(bundles, np.append(bundles[1:], len(first)), cycles, strict=True):
        first[bundle:next_bundle] = cycle + np.arange(next_bundle - bundle)
    return first
