"""What the report is about: a kernel to compile, the work that it cannot do without, and what it does step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.simulate import Memory, Program


@dataclasses.dataclass(frozen=True)
class Work:
    """What no kernel for the same result can avoid: `flops` on operands of `dtype`, and every operand and result moved once."""

    flops: float
    bytes: float
    dtype: str = "bfloat16"

    def roofline(self, chip: Chip, memory: Memory, flops: float | None = None) -> float:
        """Seconds at full use of the matrix units or of the HBM bandwidth that is assumed, whichever takes longer. `flops`, if given,
        are done instead of those of the work."""
        return max((self.flops if flops is None else flops) / chip.flops[self.dtype], self.memory_seconds(chip, memory))

    def bound(self, chip: Chip, memory: Memory) -> str:
        return "MXU" if self.flops / chip.flops[self.dtype] > self.memory_seconds(chip, memory) else "HBM"

    def memory_seconds(self, chip: Chip, memory: Memory) -> float:
        return self.bytes / (chip.hbm * memory.efficiency)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
      name: names what is compiled; cases of the same name and chip share one compilation.
      launch: the function and its arguments' shapes for a chip; raises `CompileError` with the reason if it has none.
      program: its steps for concrete group sizes, from its schedule; None for a kernel that is only compiled.
      least_flops: operations that no kernel for the same result can avoid at concrete group sizes, since matrix units take rows and
        contract in whole packs and tiles; None if they are those of the work.
    """

    name: str
    launch: Callable[[Chip], Launch]
    work: Work
    program: Callable[[Chip, Compilation, np.ndarray], Program] | None = None
    least_flops: Callable[[Chip, np.ndarray], float] | None = None
