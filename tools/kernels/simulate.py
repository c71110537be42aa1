"""Models a kernel's time from its steps: compute of known cycles, and transfers that queue for the HBM.

A kernel describes what it does for concrete group sizes as a list of steps per core:

    [Step(issues=(("x", 0), 1 << 20), (("w", 0), 4 << 20)),                                  # prologue: fills the buffers
     Step(4096, waits=(("x", 0), ("w", 0)), issues=((("x", 1), 1 << 20),), writes=((("y", 0), 1 << 20),)),
     ...]

Steps run one after the other. A step waits for its transfers, then puts `issues` on the queue and computes; at the end of its
compute it puts `writes` on the queue. The queue is serial: each transfer takes its bytes at the core's share of the HBM bandwidth,
and a fixed latency if one is assumed. A program ends when all steps and all transfers have.

The model knows no latency of a first byte (unless told), no contention between cores, and no cost of waiting itself: it is a lower
bound of what the kernel's own order of work allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

from tools.kernels.chips import Chip

Transfer = tuple[Hashable, float]  # name, bytes


class ProgramError(ValueError):
    """A program that cannot run."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One stretch of compute and the transfers around it.

    Attributes:
      compute_cycles: cycles from the schedule.
      waits: names of transfers that must have arrived before the compute starts; earlier steps put them on the queue.
      issues: transfers put on the queue when the step starts, after its waits.
      writes: transfers put on the queue when its compute ends.
      flops: floating-point operations of the matrix units in this step, those on padding included.
    """

    compute_cycles: float = 0
    waits: tuple[Hashable, ...] = ()
    issues: tuple[Transfer, ...] = ()
    writes: tuple[Transfer, ...] = ()
    flops: float = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of each core of a device; one sequence stands for all where they are alike."""

    cores: tuple[Sequence[Step], ...]

    @property
    def bytes(self) -> float:
        """What all cores together move to and from HBM."""
        return sum(size for steps in self.cores for step in steps for _, size in (*step.issues, *step.writes))

    @property
    def flops(self) -> float:
        """What the matrix units of all cores do, padding included."""
        return sum(step.flops for steps in self.cores for step in steps)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is assumed of the way to HBM: the share of the peak bandwidth that is reached, and seconds added to each transfer."""

    efficiency: float = 1.0
    latency: float = 0.0

    def bandwidth(self, chip: Chip) -> float:
        """Bytes per second of one core."""
        return chip.hbm * self.efficiency / chip.cores


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A simulated program, of its slowest core: seconds in all, computing and waiting for transfers, of which the first is the sum;
    seconds that the queue is busy; and the matrix units' operations."""

    time: float
    compute: float
    stalls: float
    queue: float
    flops: float


def simulate(program: Program, chip: Chip, memory: Memory) -> Outcome:
    """Runs a program on all cores of a device, each with its own queue."""
    return max((_run(steps, chip, memory) for steps in program.cores), key=lambda outcome: outcome.time)


def _run(steps: Iterable[Step], chip: Chip, memory: Memory) -> Outcome:
    bandwidth = memory.bandwidth(chip)
    arrival: dict[Hashable, float] = {}
    now = queue_free = compute = stalls = queue = flops = 0.0

    def enqueue(transfers: tuple[Transfer, ...]) -> None:
        nonlocal queue_free, queue
        for name, size in transfers:
            if name in arrival:
                raise ProgramError(f"step {index} puts transfer {name} on the queue again; every transfer needs a name of its own.")
            seconds = size / bandwidth + memory.latency
            queue_free = max(queue_free, now) + seconds
            queue += seconds
            arrival[name] = queue_free

    for index, step in enumerate(steps):
        for name in step.waits:
            if name not in arrival:
                raise ProgramError(f"step {index} waits for transfer {name}, which no earlier step put on the queue.")
        ready = max([now, *(arrival[name] for name in step.waits)])
        stalls += ready - now
        now = ready
        enqueue(step.issues)
        seconds = step.compute_cycles / chip.clock
        now, compute, flops = now + seconds, compute + seconds, flops + step.flops
        enqueue(step.writes)
    end = max(now, queue_free)
    return Outcome(end, compute, stalls + end - now, queue, flops)
