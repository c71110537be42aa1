"""Ahead-of-time compilation for TPU pods on a machine without TPUs, and what the compiled program says about itself.

    mesh = pod_mesh("v5p:4x4x4", fsdp=8, expert=8)
    with jax.set_mesh(mesh):
        program = compile_for(mesh, function, *abstract_arguments)
    print(program.hbm, program.collectives)

libtpu compiles for any topology by its name: `v5p:4x4x4`, `v6e:8x8` (a device is a chip), `tpu7x:4x4x2` (a chip is two devices). It
knows memory, collectives and FLOPs exactly; time it does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError

# HBM of a device that programs may use: what libtpu's compiler holds against them, in bytes.
HBM = {"v5p": 95 * 2**30, "v6e": int(31.25 * 2**30), "tpu7x": int(94.75 * 2**30)}

# libtpu reads these once, when it is loaded. Without them it looks for the machine's TPU, complains that there is none, refuses to
# be loaded by two processes, and hides the partitioner's warnings in a file.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


def can_compile() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def pod_mesh(topology: str, **sizes: int) -> Mesh:
    """`sharding.make_mesh` of these sizes over the devices of a topology that need not exist.

    Raises:
      ConfigError: libtpu is not installed or does not know the topology; the sizes do not multiply to its number of devices.
    """
    if not can_compile():
        raise ConfigError("compiling for TPUs needs libtpu: pip install 'interns1pro_jax[tpu]' (Linux on x86-64).")
    if topology.partition(":")[0] not in HBM:
        raise ConfigError(f"topology {topology!r}: the name starts with one of {', '.join(HBM)} and a colon, as in 'v5p:4x4x4'.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:  # libtpu's own, of no common type
        raise ConfigError(f"libtpu does not know the topology {topology!r}: {str(error).splitlines()[0]}") from error
    return sharding.make_mesh(**sizes, devices=devices)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program; a pair of start and done is one.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      scope: where it comes from (JAX's operation name with its `named_scope`s); empty where the compiler made it up.
      bytes: size of the array that is gathered, reduced or exchanged, in its undivided form.
      axes: mesh axes along which devices take part in it; None if its groups are not those of any axes.
      looped: whether it is in the body of a loop, so that it runs once per layer.
    """

    kind: str
    scope: str
    bytes: int
    axes: tuple[str, ...] | None
    looped: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in a compiled program.

    Attributes:
      text: the optimised HLO.
      collectives: in the order of the text.
      hbm: bytes in use at the peak: arguments, results, temporaries and code.
      flops: of everything, kernels (custom calls) by their own estimates; bodies of loops count once.
      kernel_flops: of the kernels alone.
      warnings: what the compiler wrote to the standard error.
    """

    text: str
    collectives: tuple[Collective, ...]
    hbm: int
    flops: float
    kernel_flops: float
    warnings: str


def compile_for(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles `function` for the devices of `mesh`, which must be in force; `arguments` are `jax.ShapeDtypeStruct`s with shardings."""
    lowered = jax.jit(function).lower(*arguments)
    with _standard_error() as warnings:
        compiled = lowered.compile()
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    assert text is not None and memory is not None and cost is not None
    return Program(
        text=text,
        collectives=tuple(collectives(text, mesh)),
        hbm=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),  # absent where there are none
        kernel_flops=sum(map(float, re.findall(r'"cost_estimate":\{"flops":"(\d+)"', text))),
        warnings="".join(warnings),
    )


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects what C++ writes to the standard error, which still appears there in the end."""
    lines: list[str] = []
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            lines.extend(line.decode(errors="replace") for line in file)
            sys.stderr.writelines(lines)


# Reading HLO ----------------------------------------------------------------------------------------------------------

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0} | {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}
_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_CALLED = re.compile(r"\b(body|condition|to_apply|calls)=%([\w.\-]+)|\b(branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of HLO text: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

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


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Instructions by name, of each computation by name; a computation comes before those that call it."""
    found: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = found.setdefault(header[1], {})
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return found


def collectives(text: str, mesh: Mesh) -> Iterator[Collective]:
    """The collectives in the optimised HLO of a program that was compiled for `mesh`.

    On TPUs a collective may be inside a fusion (a reduce-scatter as an all-reduce and a slice of its result) or in a computation
    for the SparseCore that is started and awaited; it is its instruction that counts, wherever it is.

    Raises:
      ValueError: replica groups or types in a form that is not known here.
    """
    program = computations(text)
    looped: set[str] = set()
    for name in reversed(program):  # callers before those they call
        for instruction in program[name].values():
            looped |= {called for how, called in instruction.called if how in ("body", "condition") or name in looped}
    for name, instructions in program.items():
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS:
                yield _collective(kind, instruction, instructions, program, mesh, name in looped)


def _collective(
    kind: str,
    instruction: Instruction,
    siblings: dict[str, Instruction],
    program: dict[str, dict[str, Instruction]],
    mesh: Mesh,
    looped: bool,
) -> Collective:
    groups = replica_groups(instruction.attributes, mesh.size)
    size = sum(_bytes(siblings[name].type) for name in instruction.operands)
    if kind == "all-gather":
        size *= len(groups[0])
    if kind == "all-reduce" and any(
        i.root and i.opcode == "dynamic-slice" and i.operands[0] == instruction.name for i in siblings.values()
    ):
        kind = "reduce-scatter"
    # The compiler's rewrites lose the name of a reduction, but not those inside the function that it applies.
    reducer = [i.op_name for how, called in instruction.called if how == "to_apply" for i in program[called].values()]
    scope = instruction.op_name or next(filter(None, reducer), "")
    return Collective(kind, scope, size, _axes(kind, groups, mesh), looped)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].partition("(")
    opening = end + len(opcode)
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), rest[:end], opcode.strip(), tuple(operands), rest[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _bytes(type_text: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text):
        bits = _BITS.get(dtype) or (8 if dtype.startswith("f8") else None)
        if bits is None and dtype != "token":
            raise ValueError(f"HLO element type {dtype!r} is not known to interns1pro_jax.train.aot.")
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
