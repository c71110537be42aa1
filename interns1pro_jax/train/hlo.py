"""What the text of an optimised program says: its instructions, how often each runs, its collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program; a pair of start and done is one.

    Attributes:
      name: of its instruction.
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      scope: where it comes from (JAX's operation name with its `named_scope`s); empty where the compiler made it up.
      bytes: size of the array that is gathered, reduced or exchanged, in its undivided form.
      axes: mesh axes along which devices take part in it; None if its groups are not those of any axes.
      times: how often it runs: a collective in the body of the loop over the layers, once per layer.
      asynchronous: whether other instructions are scheduled between its start and its end.
    """

    name: str
    kind: str
    scope: str
    bytes: int
    axes: tuple[str, ...] | None
    times: int
    asynchronous: bool


_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0} | {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}
_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_CALLED = re.compile(r"\b(body|condition|to_apply|calls)=%([\w.\-]+)|\b(branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of HLO text: `%name = type opcode(operands), attributes`; `number` is the value of an integer
    constant, or the place of a parameter."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    number: int | None = None

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[tuple[str, str]]:
        """Computations that it calls, each with the attribute that says so."""
        found = []
        for how, one, branches, several in _CALLED.findall(self.attributes.partition(", backend_config=")[0]):
            found += [(how, one)] if how else [(branches, name.strip(" %")) for name in several.split(",")]
        return found


Computation = dict[str, Instruction]
Program = dict[str, Computation]


def computations(text: str) -> Program:
    """Instructions by name, of each computation by name; a computation comes before those that call it."""
    found: Program = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = found.setdefault(header[1], {})
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif line.startswith(("  %", "  ROOT %")):  # others continue an instruction: a kernel's metadata may span lines
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return found


def executions(program: Program) -> dict[str, int]:
    """How often each computation runs: once, or as often as the loops around it say.

    A loop over 0, 1, ... N-1, as scans are, compares its counter with N. Loops whose length is not known before they run count once.
    """
    times = dict.fromkeys(program, 0)
    times[next(reversed(program))] = 1  # the entry comes last
    for name in reversed(program):  # callers before those they call
        for instruction in program[name].values():
            count = trips(instruction, program)
            for how, called in instruction.called:
                times[called] += times[name] * (count if how in ("body", "condition") else 1)
    return times


def trips(loop: Instruction, program: Program) -> int:
    """Times that the body of a loop runs; 1 for what is no loop, or one of unknown length."""
    condition = next((program[called] for how, called in loop.called if how == "condition"), {})
    for test in condition.values():
        if test.root and test.opcode == "compare" and "direction=LT" in test.attributes:
            limits = [condition[name].number for name in test.operands if condition[name].opcode == "constant"]
            if limits and limits[0] is not None:
                return limits[0]
    return 1


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives in the optimised HLO of a program that was compiled for `mesh`, in the order of the text.

    Raises:
      ValueError: replica groups or types in a form that is not known here.
    """
    return [collective for _, collective in collectives_of(computations(text), mesh)]


def collectives_of(program: Program, mesh: Mesh) -> Iterator[tuple[str, Collective]]:
    """Each collective of a program with the computation it is in.

    On TPUs a collective may be inside a fusion (a reduce-scatter as an all-reduce and a slice of its result), in a computation for
    the SparseCore that is started and awaited, or spread over fusions that compute something else meanwhile; it counts once,
    where it starts.
    """
    times = executions(program)
    started = {called for c in program.values() for i in c.values() if starts(i, program) for called in reached(i, program)}
    for name, instructions in program.items():
        if continues(name, instructions):
            continue
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS:
                asynchronous = name in started or instruction.opcode.endswith("-start")
                yield name, _collective(kind, instruction, instructions, program, mesh, times[name], asynchronous)


def reached(instruction: Instruction, program: Program) -> set[str]:
    """The computations that an instruction calls, and those that they call in turn."""
    found = {called for _, called in instruction.called}
    for name in tuple(found):
        found |= {inner for i in program[name].values() if i.opcode == "call" for inner in reached(i, program)}
    return found


def starts(instruction: Instruction, program: Program) -> bool:
    """Whether the instruction starts something that goes on while those behind it run."""
    if instruction.opcode == "fusion":
        return any(_calls(program[called], "AsyncCollectiveStart") for _, called in instruction.called)
    return instruction.opcode.endswith("-start")


def ends(instruction: Instruction, program: Program) -> bool:
    """Whether the instruction waits for what another started."""
    if instruction.opcode == "fusion":
        return any(_calls(program[called], "AsyncCollectiveDone") for _, called in instruction.called)
    return instruction.opcode.endswith("-done")


def continues(name: str, instructions: Computation) -> bool:
    """Whether the collectives of a computation are only steps of one that was started elsewhere."""
    return name.startswith("async_collective_fusion") or _calls(instructions, "AsyncCollectiveDone")


def _calls(instructions: Computation, target: str) -> bool:
    return any(i.opcode == "custom-call" and f'custom_call_target="{target}"' in i.attributes for i in instructions.values())


def _collective(
    kind: str,
    instruction: Instruction,
    siblings: Computation,
    program: Program,
    mesh: Mesh,
    times: int,
    asynchronous: bool,
) -> Collective:
    groups = replica_groups(instruction.attributes, mesh.size)
    size = sum(bytes_of(siblings[name].type) for name in instruction.operands)
    if kind == "all-gather":
        size *= len(groups[0])
    if kind == "all-reduce" and any(
        i.root and i.opcode == "dynamic-slice" and i.operands[0] == instruction.name for i in siblings.values()
    ):
        kind = "reduce-scatter"
    # The compiler's rewrites lose the name of a reduction, but not those inside the function that it applies.
    reducer = [i.op_name for how, called in instruction.called if how == "to_apply" for i in program[called].values()]
    scope = instruction.op_name or next(filter(None, reducer), "")
    return Collective(instruction.name, kind, scope, size, _axes(kind, groups, mesh), times, asynchronous)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].partition("(")
    opening = end + len(opcode)
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    inside = rest[opening + 1 : closing]
    number = int(inside) if opcode.strip() in ("constant", "parameter") and re.fullmatch(r"-?\d+", inside) else None
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"), rest[:end], opcode.strip(), tuple(operands), rest[closing + 1 :], root, number
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def control_flow(program: Program) -> set[str]:
    """Computations whose instructions run one after the other: the entry, bodies of loops, branches. The others are parts of one."""
    found = {next(reversed(program))}
    for name in reversed(program):
        if name in found:
            for instruction in program[name].values():
                if instruction.opcode in ("while", "conditional", "call"):
                    found |= {called for how, called in instruction.called if how != "condition"}
    return found


def shape_of(type_text: str) -> list[int]:
    """Dimensions of the first array of a type."""
    found = re.search(r"\[([\d,]*)\]", type_text)
    return _integers(found[1]) if found and found[1] else []


def bytes_of(type_text: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text):
        bits = _BITS.get(dtype) or (8 if dtype.startswith("f8") else None)
        if bits is None and dtype != "token":
            raise ValueError(f"HLO element type {dtype!r} is not known to interns1pro_jax.train.hlo.")
        total += math.prod(map(int, filter(None, dims.split(",")))) * (bits or 0) // 8
    return total


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of devices (by their place in the mesh) that take part in a collective together; pairs of a permutation."""
    everyone = np.arange(devices)
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return [_integers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if "replica_groups={}" in attributes:
        return [everyone.tolist()]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", attributes):
        return _groups_along(named[1], everyone if named[2] is None else _iota(named[2], named[3]), named[4])
    raise ValueError(f"replica groups of an unknown form in HLO: {attributes[:300]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """`[dims]T(order)`: all devices as an array of these dimensions, transposed."""
    sizes = _integers(dims)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_integers(order) if order else None)


def _groups_along(mesh: str, devices: np.ndarray, axes: str) -> list[list[int]]:
    """Groups along axes, as in `'a','b':(2)4`, of a mesh as in `'a'=2,'b'=16`; `:(2)4` is a part of size 4 of its axis, inside one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"([^',]+)'?=(\d+)", mesh)}
    parts = {name: [size] for name, size in sizes.items()}
    chosen = []
    for name, outer, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", axes):
        if outer:
            parts[name] = [int(outer), int(size), sizes[name] // (int(outer) * int(size))]
        chosen.append((name, bool(outer)))
    if len({name for name, _ in chosen}) < len(chosen):
        raise ValueError(f"replica groups along several parts of an axis are not read: mesh {mesh}, axes {axes}")
    first = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]).tolist(), strict=False))
    places = [first[name] + inner for name, inner in chosen]
    array = devices.reshape([size for sizes in parts.values() for size in sizes])
    array = np.moveaxis(array, places, range(-len(places), 0))
    return array.reshape(-1, math.prod(array.shape[-len(places) :])).tolist()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _axes(kind: str, groups: list[list[int]], mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes along which the devices of a group differ: the same for all groups, which are complete along them. The pairs
    of a permutation may each differ along some of the axes."""
    shape = tuple(mesh.shape.values())
    differing = [
        {name for name, c in zip(mesh.axis_names, np.unravel_index(group, shape), strict=True) if len(set(c)) > 1} for group in groups
    ]
    axes = tuple(name for name in mesh.axis_names if any(name in names for names in differing))
    size = math.prod(mesh.shape[name] for name in axes)
    complete = all(names == set(axes) and len(group) == size for names, group in zip(differing, groups, strict=True))
    return axes if complete or kind == "collective-permute" else None
