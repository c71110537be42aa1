"""Steps of kernels whose transfers a grid's pipeline places: blocks are fetched ahead, and written when the grid leaves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

from tools.kernels.simulate import Step, Transfer

Block = tuple[Hashable, float]  # index, bytes


@dataclasses.dataclass(frozen=True)
class Visit:
    """One step of the grid: its cycles and matrix work, the block of each operand that it reads, and the block that it writes."""

    cycles: float
    flops: float
    inputs: Mapping[str, Block]
    output: Block


def pipelined(visits: Sequence[Visit], buffers: Mapping[str, int]) -> list[Step]:
    """The steps of one core's visits. An operand with `buffers` buffers is fetched that many visits ahead less one, if its block
    differs from that of the visit before. A result has two buffers: the write of the block before last must be through before a new
    block is begun."""
    issues: list[list[Transfer]] = [[] for _ in range(len(visits) + 1)]  # of the prologue, then of each visit
    steps: list[Step] = []
    held: dict[str, tuple[Hashable, Hashable]] = {}  # operand -> index of its block, name of its transfer
    written: list[Hashable] = []
    fresh = True
    for place, visit in enumerate(visits):
        for operand, (index, size) in visit.inputs.items():
            if operand not in held or held[operand][0] != index:
                held[operand] = (index, (operand, place))
                issues[max(0, place + 2 - buffers[operand])].append(((operand, place), size))
        waits = [name for _, name in held.values()]
        if fresh and len(written) >= 2:
            waits.append(written[-2])
        fresh = place + 1 == len(visits) or visits[place + 1].output[0] != visit.output[0]
        writes = [(("output", place), visit.output[1])] if fresh else []
        written += [name for name, _ in writes]
        steps.append(Step(visit.cycles, tuple(waits), (), tuple(writes), visit.flops))
    return [dataclasses.replace(step, issues=tuple(transfers)) for step, transfers in zip([Step(), *steps], issues, strict=True)]
