"""Compiles the selected kernels and models their times; the records that tables and pictures are made from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tools.kernels.cases import Case
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, CompileError, Compiler
from tools.kernels.parts import Parts, divide
from tools.kernels.peers import Contender
from tools.kernels.products import PRODUCTS, Product, group_sizes
from tools.kernels.schedule import ScheduleError
from tools.kernels.simulate import Memory, ProgramError, simulate

# Sum of the six products' modelled times over the sum of their rooflines, at most, by rows.
BARS = {8192: 1.15, 32768: 1.08, 65536: 1.08}


@dataclasses.dataclass(frozen=True)
class Hot:
    """A region of a kernel that holds products: cycles of one pass, and what its products would take at full matrix use."""

    cycles: int
    matrix_cycles: float
    matrix_use: float
    spills: int
    fills: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case; sizes in bytes. `error` is set if it made nothing, or what it made is not understood."""

    chip: str
    kernel: str
    case: str
    error: str | None = None
    vmem: int = 0
    code: int = 0
    bundles: int = 0
    seconds: float = 0.0
    hot: tuple[Hot, ...] = ()
    tree: str = ""


@dataclasses.dataclass(frozen=True)
class Modelled:
    """A modelled run of a case; times in seconds.

    Attributes:
      sizes: how the rows are divided into groups; empty for a kernel without groups.
      bytes: to and from HBM.
      flops: floating-point operations of the matrix units, of which `needed` are those of the rows that exist.
      least_time: of any kernel for the same result, given the matrix units' granularity.
      parts: of the time, of the core that ends last; `queue` is how long its transfers take.
    """

    chip: str
    kernel: str
    product: str
    rows: int
    sizes: str
    case: str
    bytes: float
    flops: float
    needed: float
    roofline: float
    bound: str
    least_time: float
    time: float
    queue: float
    parts: Parts

    @property
    def ratio(self) -> float:
        return self.time / self.roofline

    @property
    def work(self) -> float:
        return self.flops / self.needed


@dataclasses.dataclass(frozen=True)
class Sum:
    """Products of one layer together; `missing` names those without a result."""

    chip: str
    rows: int
    sizes: str
    kernel: str
    roofline: float
    least_time: float
    time: float
    flops: float
    needed: float
    parts: Parts
    products: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.time / self.roofline

    @property
    def bar(self) -> float | None:
        """The ratio to keep; there is none for some of the products only."""
        return BARS.get(self.rows) if set(self.products) == set(PRODUCTS) else None

    @property
    def least_ratio(self) -> float:
        return self.least_time / self.roofline

    @property
    def work(self) -> float:
        return self.flops / self.needed


@dataclasses.dataclass
class Report:
    """All records of a run."""

    compiled: list[Compiled] = dataclasses.field(default_factory=list)
    modelled: list[Modelled] = dataclasses.field(default_factory=list)

    def best(self) -> list[Modelled]:
        """Of each kernel's cases for one cell, the fastest; in the order of the run."""
        found: dict[tuple, Modelled] = {}
        for record in self.modelled:
            key = (record.chip, record.rows, record.sizes, record.product, record.kernel)
            if key not in found or record.time < found[key].time:
                found[key] = record
        return list(found.values())

    def sums(self, products: Iterable[str], kernels: Mapping[str, Sequence[str]]) -> list[Sum]:
        """Per chip, rows and sizes, and per entry of `kernels` the sum over products of its members' best."""
        best, names = self.best(), list(products)
        cells = dict.fromkeys((record.chip, record.rows, record.sizes) for record in best)
        sums = [_sum(cell, name, members, names, best) for cell in cells for name, members in kernels.items()]
        return [total for total in sums if total.needed]


def _sum(cell: tuple[str, int, str], name: str, members: Sequence[str], products: list[str], best: list[Modelled]) -> Sum:
    fastest: dict[str, Modelled] = {}
    for record in best:
        if (record.chip, record.rows, record.sizes) == cell and record.kernel in members and record.product in products:
            other = fastest.get(record.product)
            fastest[record.product] = record if other is None or record.time < other.time else other
    return Sum(
        *cell,
        name,
        roofline=sum(record.roofline for record in fastest.values()),
        least_time=sum(record.least_time for record in fastest.values()),
        time=sum(record.time for record in fastest.values()),
        flops=sum(record.flops for record in fastest.values()),
        needed=sum(record.needed for record in fastest.values()),
        parts=Parts(*map(sum, zip(*(record.parts for record in fastest.values()), strict=True))) if fastest else Parts(),
        products=tuple(products),
        missing=tuple(product for product in products if product not in fastest),
    )


class Runner:
    """Compiles each case once per chip and collects the records."""

    def __init__(self, compiler: Compiler, memory: Memory, say: Callable[[str], None]):
        self.report = Report()
        self._compiler, self._memory, self._say = compiler, memory, say
        self._known: dict[tuple[str, str], Compilation | None] = {}
        self._started = time.monotonic()

    def grouped(
        self,
        contenders: Mapping[str, Contender],
        chips: Sequence[Chip],
        products: Sequence[Product],
        rows: Sequence[int],
        sizes: Sequence[str],
    ) -> None:
        """Every contender on every product at every number of rows and kind of sizes."""
        plan = [
            (chip, kernel, product, count, case)
            for chip in chips
            for product in products
            for kernel, contender in contenders.items()
            for count in rows
            for case in contender(chip, product, count)
        ]
        total = len({(chip.name, case.name) for chip, _, _, _, case in plan})
        for chip, kernel, product, count, case in plan:
            for kind in sizes:
                self._model(chip, kernel, case, (product.name, count, kind), group_sizes(count, kind), total)

    def others(self, kernel: str, cases: Callable[[Chip], list[Case]], chips: Sequence[Chip]) -> None:
        """A kernel without groups of rows."""
        plan = [(chip, case) for chip in chips for case in cases(chip)]
        for chip, case in plan:
            self._model(chip, kernel, case, (case.name, 0, ""), np.zeros(0, int), len(plan))

    def _model(self, chip: Chip, kernel: str, case: Case, cell: tuple[str, int, str], sizes: np.ndarray, total: int) -> None:
        compilation = self._compiled(chip, kernel, case, total)
        if compilation is None or case.program is None:
            return
        try:
            program = case.program(chip, compilation, sizes)
            outcome = simulate(program, chip, self._memory)
            least_flops = case.work.flops if case.least_flops is None else case.least_flops(chip, sizes)
            parts = divide(program, outcome, case.work, least_flops, chip)
        except (ScheduleError, ProgramError) as error:
            self._say(f"{chip.name} {case.name}: not modelled: {error}")
            self.report.compiled.append(Compiled(chip.name, kernel, case.name, error=f"compiled, but not modelled: {error}"))
            self._known[chip.name, case.name] = None
            return
        roofline, bound = case.work.roofline(chip, self._memory), case.work.bound(chip, self._memory)
        moved = (program.bytes, program.flops, case.work.flops)
        least_time = case.work.roofline(chip, self._memory, least_flops)
        times = (least_time, outcome.time, outcome.queue)
        self.report.modelled.append(Modelled(chip.name, kernel, *cell, case.name, *moved, roofline, bound, *times, parts))

    def _compiled(self, chip: Chip, kernel: str, case: Case, total: int) -> Compilation | None:
        key = (chip.name, case.name)
        if key in self._known:
            return self._known[key]
        start, compilation = time.monotonic(), None
        try:
            compilation = self._compiler.compile(chip, case.launch(chip))
            record = _record(chip, kernel, case, compilation)
        except (CompileError, ScheduleError) as error:
            record = Compiled(chip.name, kernel, case.name, error=str(error), seconds=time.monotonic() - start)
        self._known[key] = compilation
        self.report.compiled.append(record)
        result = record.error or f"{max((hot.matrix_use for hot in record.hot), default=0):.3f} matrix use, {record.bundles} bundles"
        minutes = (time.monotonic() - self._started) / 60
        self._say(f"[{len(self._known)}/{total}, {minutes:.0f} min] {chip.name} {case.name}: {result}, {record.seconds:.1f} s")
        return compilation


def _record(chip: Chip, kernel: str, case: Case, compilation: Compilation) -> Compiled:
    hot = tuple(
        Hot(region.own.cycles, region.own.matrix_cycles, region.own.matrix_use, region.own.spills, region.own.fills)
        for schedule in compilation.schedules
        for region in schedule.hot_regions()
    )
    return Compiled(
        chip.name,
        kernel,
        case.name,
        vmem=max(compilation.vmem.values(), default=0),
        code=compilation.code,
        bundles=sum(schedule.root.total.bundles for schedule in compilation.schedules),
        seconds=compilation.seconds,
        hot=hot,
        tree="\n".join(f"{schedule.name}\n{schedule.root.tree()}" for schedule in compilation.schedules),
    )
