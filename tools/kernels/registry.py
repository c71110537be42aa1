"""The kernels that the report knows. A new kernel is one more entry here.

A contender for the grouped products gives, for a chip, a product and a number of rows, one case per tiling worth trying; the best
of them counts. Any other kernel gives its cases for a chip.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.kernels import attention, fp8, ours, peers, plain, rotary, routing, swiglu
from tools.kernels.cases import Case
from tools.kernels.chips import Chip

OURS = "this project"
GROUPED: dict[str, peers.Contender] = {OURS: ours.grouped_matmul, **peers.installed()}
FP8: dict[str, peers.Contender] = {"this project, FP8": fp8.grouped_matmul_fp8}
OTHERS: dict[str, Callable[[Chip], list[Case]]] = {
    "plain": plain.cases,
    "routing": routing.cases,
    "rotary": rotary.cases,
    "fp8_sums": fp8.scaled_sums,
    "swiglu": swiglu.cases,
    "swiglu_gradient": swiglu.gradients,
    "attention": attention.cases,
}
