"""The kernels that the report knows. A new kernel is one more entry here.

A contender for the grouped products gives, for a chip, a product and a number of rows, one case per tiling worth trying; the best
of them counts. Any other kernel is a list of cases.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.kernels import ours, peers, plain, routing
from tools.kernels.cases import Case

OURS = "this project"
GROUPED: dict[str, peers.Contender] = {OURS: ours.grouped_matmul, **peers.installed()}
OTHERS: dict[str, Callable[[], list[Case]]] = {"plain": plain.cases, "routing": routing.cases}
