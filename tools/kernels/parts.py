"""What a modelled time is made of: the parts add up to it."""

from __future__ import annotations

from typing import NamedTuple

from tools.kernels.cases import Work
from tools.kernels.chips import Chip
from tools.kernels.simulate import Outcome, Program, ProgramError


class Parts(NamedTuple):
    """Seconds of the core that ends last.

    Attributes:
      useful: the matrix units at full use on the rows that exist, shared by all cores.
      granularity: on what no kernel can avoid besides, since matrix units take whole packs of rows and contract whole tiles.
      padding: on everything else: rows that were not needed, and work that other cores do not share.
      overhead: computing, but less than full use: filling and draining the matrix units, code between straight runs of products.
      waiting: for transfers.
    """

    useful: float = 0.0
    granularity: float = 0.0
    padding: float = 0.0
    overhead: float = 0.0
    waiting: float = 0.0


def divide(program: Program, outcome: Outcome, work: Work, least_flops: float, chip: Chip) -> Parts:
    """The parts of a simulated program.

    Raises:
      ProgramError: the program does less than is needed, or takes fewer cycles than its products must: it is no model of the kernel.
    """
    if program.flops < least_flops * (1 - 1e-9):
        raise ProgramError(f"{program.flops:.6g} operations are modelled, but {least_flops:.6g} are needed at least.")
    peak = chip.flops[work.dtype]
    useful, least, busy = work.flops / peak, least_flops / peak, outcome.flops / (peak / chip.cores)
    # Published peaks are rounded, so compute at full use may come out a little shorter than they allow.
    if outcome.compute < busy * (1 - 1e-3):
        raise ProgramError(f"{outcome.compute:.6g} s of compute are modelled, but its products take {busy:.6g} s at full use.")
    return Parts(useful, least - useful, busy - least, outcome.compute - busy, outcome.stalls)
