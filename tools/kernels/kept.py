"""Keeps what the compiler made of a program, so that a second report compiles only what changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.kernels.chips import Chip
from tools.kernels.schedule import Counts, Region, Schedule


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled program.

    Attributes:
      schedules: of its Pallas kernels, in the order of compilation.
      vmem: bytes of scoped VMEM by name of the kernel.
      code: bytes of the whole program, less those of a program that only copies its argument.
      seconds: wall time of the compilation.
      estimated_cycles: XLA's own estimates for its fusions, summed; kernels have none.
    """

    schedules: list[Schedule]
    vmem: dict[str, int]
    code: int
    seconds: float
    estimated_cycles: int = 0

    @property
    def main(self) -> Schedule:
        """The kernel with the most matrix work."""
        return max(self.schedules, key=lambda schedule: schedule.root.total.matrix_cycles)


def as_json(compilation: Compilation) -> str:
    return json.dumps(dataclasses.asdict(compilation))


def from_json(text: str) -> Compilation:
    """The inverse of `as_json`."""
    found = json.loads(text)
    schedules = [Schedule(schedule["name"], _region(schedule["root"])) for schedule in found.pop("schedules")]
    return Compilation(schedules, **found)


def _region(found: dict[str, Any]) -> Region:
    children = tuple(_region(child) for child in found.pop("children"))
    return Region(children=children, total=Counts(**found.pop("total")), **found)


class Kept:
    """Compilations in a directory, by all that they depend on: the lowered program, chip, options, and the compiler's version."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def place(self, program: str, chip: Chip, options: Mapping[str, str]) -> Path:
        of = json.dumps([program, chip.name, dict(options), version("jax"), version("libtpu")])
        return self._directory / f"{hashlib.sha256(of.encode()).hexdigest()}.json"
