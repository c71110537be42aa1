"""A model of how long a compiled step takes: its own schedule, played back.

Instructions run in the order of the program. One of XLA's own takes the cycles that the compiler estimates for it, or where it makes none
(gathers of rows, sorts, scatters) the time that its bytes need; a Pallas kernel takes its FLOPs over the peak or its bytes over the
bandwidth of HBM, whichever is longer, times what the kernel report finds above that bound; a collective takes its bytes over the links
between the devices of its group. A collective that was started goes on while others run, one after the other on the links of its axes
(the SparseCores take them in order), and the step waits only where it ends. One that is not started ahead shares the links equally with
what is under way, as their packets do. What the SparseCores compute (gathers of rows) goes on likewise and takes its bytes in HBM, and
what goes to the host's memory or comes from it takes its bytes on their bus. All of it is modelled, nothing measured: latencies and
contention between axes are left out, links are taken at their published speed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict

import numpy as np
from jax.sharding import Mesh

from interns1pro_jax.flops import Hardware
from interns1pro_jax.kernel_times import ATTENTION_TIME_OVER_BOUND, KERNEL_TIME_OVER_BOUND, ROTARY_TIME_OVER_BOUND
from interns1pro_jax.train import hlo
from interns1pro_jax.train.hlo import Collective, Computation, Instruction
from interns1pro_jax.train.hlo_cost import in_hbm, kernel_cost, moved, permuted_numbers
from pallas_kernels.chips import CHIPS

# Of one number that the scalar unit puts in its place (docs/kernels.md, Routing: 80 us of 32,768 on v5p).
_PERMUTATION_CYCLES = 4.3

# Besides sets of mesh axes, what transfers occupy.
TO_HOST, FROM_HOST = ("bus to the host",), ("bus from the host",)

_SPARSE_CORE = 'async_execution_thread="sparsecore"'
_HOST = "S(5)"  # the host's memory, in types
_SLICED = re.compile(r"dynamic_slice_sizes=\{([\d,]+)\}")
_UNKNOWN = 2**62  # estimates above this stand for "not known"
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Times:
    """Modelled seconds of one step on one device.

    Attributes:
      step: all of it.
      xla: in XLA's own instructions.
      kernels: in Pallas kernels.
      waiting: for collectives and for the host's memory, with nothing else to do.
      links: in which the links of each set of mesh axes, and the bus to and from the host, are busy.
    """

    step: float = 0.0
    xla: float = 0.0
    kernels: float = 0.0
    waiting: float = 0.0
    links: dict[tuple[str, ...], float] = dataclasses.field(default_factory=dict)

    @property
    def compute(self) -> float:
        return self.xla + self.kernels

    def times(self, count: int) -> Times:
        links = {axes: count * seconds for axes, seconds in self.links.items()}
        return Times(count * self.step, count * self.xla, count * self.kernels, count * self.waiting, links)


class Links:
    """What is under way. Those sent ahead are served in order on each axis, others share an axis with the one that is served."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.busy: dict[tuple[str, ...], float] = defaultdict(float)
        self._left: list[Transfer] = []

    def send(self, name: str, axes: tuple[str, ...], seconds: float, ahead: bool) -> None:
        self.busy[axes] += seconds
        self._left.append(Transfer(name, axes, seconds, ahead))

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.clock + seconds
        while self.clock < end and self._left:
            self._step(end - self.clock)
        self.clock = end

    def wait(self, name: str) -> float:
        """Lets time pass until all transfers of this name have arrived; returns how long."""
        begin = self.clock
        while any(transfer.name == name for transfer in self._left):
            self._step(float("inf"))
        return self.clock - begin

    def _step(self, most: float) -> None:
        """Until the next transfer arrives, or so many seconds."""
        taken: set[str] = set()
        served = []
        for transfer in self._left:
            if not transfer.ahead or taken.isdisjoint(transfer.axes):
                served.append(transfer)
            taken.update(transfer.axes if transfer.ahead else ())
        users = Counter(axis for transfer in served for axis in transfer.axes)
        shares = [max(users[axis] for axis in transfer.axes) for transfer in served]
        seconds = min(most, *(transfer.seconds * share for transfer, share in zip(served, shares, strict=True)))
        self.clock += seconds
        for transfer, share in zip(served, shares, strict=True):
            transfer.seconds -= seconds / share
        self._left = [transfer for transfer in self._left if transfer.seconds > 1e-12]


@dataclasses.dataclass
class Transfer:
    """Seconds are those that it still needs with the links for itself."""

    name: str
    axes: tuple[str, ...]
    seconds: float
    ahead: bool


class Player:
    """Plays the schedule of a program that was compiled for `mesh`, whose devices are of this hardware."""

    def __init__(self, text: str, mesh: Mesh, hardware: Hardware):
        self._program = hlo.computations(text)
        self._mesh, self._hardware = mesh, hardware
        self._collectives: dict[str, list[Collective]] = defaultdict(list)
        for computation, collective in hlo.collectives_of(self._program, mesh):
            self._collectives[computation].append(collective)

    def times(self) -> Times:
        """Of the whole program."""
        return self._play(next(reversed(self._program)))

    def _play(self, computation: str) -> Times:
        instructions = self._program[computation]
        xla = kernels = waiting = 0.0
        links = Links()
        inside_loops: dict[tuple[str, ...], float] = defaultdict(float)
        pending: set[str] = set()

        def send(name: str, found: list[Collective], ahead: bool) -> None:
            for collective in found:
                links.send(name, collective.axes or tuple(self._mesh.axis_names), self.transfer(collective), ahead)

        for instruction in instructions.values():
            inside = self._inside(instruction)
            if inside is not None:
                links.run(inside.step)
                xla, kernels, waiting = xla + inside.xla, kernels + inside.kernels, waiting + inside.waiting
                for axes, seconds in inside.links.items():
                    inside_loops[axes] += seconds
                continue
            found = [] if hlo.ends(instruction, self._program) else self._own(instruction, computation)
            if hlo.starts(instruction, self._program):
                if found:
                    send(instruction.name, found, ahead=True)
                elif bus := self._of_host(instruction, instructions):
                    links.send(instruction.name, *bus, ahead=True)
                elif _SPARSE_CORE in instruction.attributes:
                    seconds = self._on_sparse_core(instruction, instructions)
                    links.send(instruction.name, (_SPARSE_CORE,), seconds, ahead=True)
                else:
                    continue
                pending.add(instruction.name)
                continue
            if hlo.ends(instruction, self._program) and (start := self._started(instruction, instructions, pending)):
                pending.remove(start)
                waiting += links.wait(start)
                continue
            if found:
                send(instruction.name, found, ahead=False)
                waiting += links.wait(instruction.name)
                continue
            if bus := self._of_host(instruction, instructions):
                links.send(instruction.name, *bus, ahead=False)
                waiting += links.wait(instruction.name)
                continue
            seconds, kernel = self._compute(instruction, instructions)
            links.run(seconds)
            xla, kernels = xla + (0 if kernel else seconds), kernels + (seconds if kernel else 0)
        busy = {axes: seconds for axes, seconds in links.busy.items() if axes != (_SPARSE_CORE,)}
        for axes, seconds in inside_loops.items():
            busy[axes] = busy.get(axes, 0.0) + seconds
        return Times(links.clock, xla, kernels, waiting, busy)

    def _inside(self, instruction: Instruction) -> Times | None:
        """Of the computations that a loop, a branch or a call runs; of the longest branch."""
        if instruction.opcode == "while":
            body = next(called for how, called in instruction.called if how == "body")
            return self._play(body).times(hlo.trips(instruction, self._program))
        if instruction.opcode in ("conditional", "call"):
            return max((self._play(called) for _, called in instruction.called), key=lambda times: times.step)
        return None

    def _on_sparse_core(self, start: Instruction, siblings: Computation) -> float:
        """What is computed there (rows gathered, arrays laid out anew) is read and written once; the end has its type."""
        ends = (i for i in siblings.values() if start.name in i.operands)
        return sum(2 * in_hbm(end.type) for end in ends) / self._hardware.bandwidth

    def _of_host(self, instruction: Instruction, siblings: Computation) -> tuple[tuple[str, ...], float] | None:
        """Which way an instruction moves bytes over the bus between chip and host, and the seconds that they take; None if it does not."""
        kind = instruction.opcode.removesuffix("-start")
        if kind == "async":
            bodies = [self._program[called] for called in hlo.reached(instruction, self._program)]
            return next(filter(None, (self._of_host(inner, body) for body in bodies for inner in body.values())), None)
        if kind not in ("copy", "dynamic-slice", "dynamic-update-slice"):
            return None
        source = siblings[instruction.operands[0]].type
        if kind == "copy" and _HOST not in source and _HOST in instruction.type:
            way, size = TO_HOST, hlo.bytes_of(source)
        elif _HOST not in source:
            return None
        elif kind == "dynamic-update-slice":
            way, size = TO_HOST, hlo.bytes_of(siblings[instruction.operands[1]].type)
        elif kind == "copy":
            way, size = FROM_HOST, hlo.bytes_of(source)
        else:
            found = _SLICED.search(instruction.attributes)
            part = math.prod(map(int, found[1].split(","))) if found else math.prod(hlo.shape_of(source))
            way, size = FROM_HOST, hlo.bytes_of(source) * part // math.prod(hlo.shape_of(source))
        return way, size / self._hardware.host_link

    def _own(self, instruction: Instruction, computation: str) -> list[Collective]:
        """Collectives that an instruction is, or has inside."""
        found = [c for c in self._collectives[computation] if c.name == instruction.name]
        if instruction.opcode not in ("all-reduce", "reduce-scatter"):  # these call what adds two numbers
            found += [c for called in sorted(hlo.reached(instruction, self._program)) for c in self._collectives[called]]
        return found

    def _started(self, end: Instruction, siblings: Computation, pending: set[str]) -> str | None:
        """The pending start whose result, by way of other instructions, an end waits for."""
        seen: set[str] = set()
        frontier = list(end.operands)
        while frontier:
            name = frontier.pop()
            if name in pending:
                return name
            if name not in seen and name in siblings:
                seen.add(name)
                frontier += siblings[name].operands
        return None

    def _compute(self, instruction: Instruction, siblings: Computation) -> tuple[float, bool]:
        """Seconds of an instruction, and whether it is a Pallas kernel."""
        hardware = self._hardware
        clock = CHIPS[hardware.name].clock
        if cost := kernel_cost(instruction):
            bound = max(cost.flops / hardware.peak, cost.bytes / hardware.bandwidth)
            own = (over for name, over in (ATTENTION_TIME_OVER_BOUND | ROTARY_TIME_OVER_BOUND).items() if name in instruction.name)
            return next(own, KERNEL_TIME_OVER_BOUND)[hardware.name] * bound, True
        if numbers := permuted_numbers(instruction):
            return _PERMUTATION_CYCLES * numbers / clock, True
        found = _CYCLES.search(instruction.attributes)
        if found and int(found[1]) < _UNKNOWN:
            return int(found[1]) / clock, False
        # Gathers of rows, sorts, scatters, small kernels: the compiler estimates nothing, so they move their bytes.
        if instruction.opcode in ("fusion", "custom-call", "sort", "scatter", "gather"):
            return moved(instruction, siblings, self._program) / hardware.bandwidth, instruction.opcode == "custom-call"
        return 0.0, False

    # Links -------------------------------------------------------------------------------------------------------------

    def transfer(self, collective: Collective) -> float:
        """Seconds that the links need for a collective."""
        axes = collective.axes or self._mesh.axis_names
        chips, bandwidth, across = self._group(axes)
        factor = {"all-reduce": 2.0, "all-to-all": max(chips / 8, 0.5), "collective-permute": 1.0}.get(collective.kind, 1.0)
        seconds = 0.0
        if chips > 1:
            seconds += factor * collective.bytes * (chips - 1) / chips / bandwidth
        if across > 1:  # each device of a slice exchanges its part with its likes in the others
            seconds += factor * collective.bytes / chips * (across - 1) / across / self._hardware.slice_link
        return seconds

    def _group(self, axes: tuple[str, ...]) -> tuple[int, float, int]:
        """Chips of one slice in a group along these mesh axes, bytes per second into one device of it, and slices it spans.

        Every dimension of the torus that the group fills gives two links, a part of one gives one, since its ends have no
        neighbour. Devices of one chip share what comes in once for both; groups that split a chip share its links.
        """
        mesh, hardware = self._mesh, self._hardware
        index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
        group = np.atleast_1d(mesh.devices[index]).ravel()
        everyone = np.array([device.coords for device in mesh.devices.ravel()])
        coords = np.array([device.coords for device in group])
        links = 0
        for dim in range(coords.shape[1]):
            places, extent = np.unique(coords[:, dim]), int(everyone[:, dim].max()) + 1
            if len(places) > 1 and np.all(np.diff(places) == 1):
                links += 2 if len(places) == extent >= hardware.wraps_from else 1
        slices = {getattr(device, "slice_index", 0) or 0 for device in group}
        chips = len(np.unique(coords, axis=0))
        cores = len(group) // (chips * len(slices))
        return chips, max(links, 1) * hardware.link * cores / hardware.devices_per_chip, len(slices)
