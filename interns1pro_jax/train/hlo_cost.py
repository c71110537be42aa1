"""What a compiled program computes and moves in one step: bodies of loops count as often as they run."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from interns1pro_jax.train.hlo import Computation, Instruction, Program, bytes_of, control_flow, executions, shape_of
from pallas_kernels.permutation import WINDOW

_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_OPERANDS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")
_ARRAY = re.compile(r"\w+\[[\d,]*\]")
# Products of a query block with a key block: scores and values; the backward computes the scores again and four gradients, in two kernels
# that both compute scores and the gradient of the weights.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# The kernels of `pallas_kernels.permutation`, which the scalar unit does number by number.
_PERMUTATIONS = ("permute", "invert")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# They move nothing, or what they move is counted where it is computed.
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id"}


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """FLOPs and bytes of a Pallas kernel."""

    flops: int
    bytes: int


def kernel_cost(instruction: Instruction) -> KernelCost | None:
    """By its own estimate, or for the splash kernels, which make none, by the shapes of their operands; None for other instructions."""
    if instruction.opcode != "custom-call":
        return None
    if found := _KERNEL.search(instruction.attributes):
        return KernelCost(int(found[1]), int(found[2]))
    products = next((count for name, count in _SPLASH.items() if instruction.name.startswith(name)), None)
    operands = _OPERANDS.search(instruction.attributes)
    if products is None or operands is None:
        return None
    blocks, _, q, k, *_ = [shape_of(array) for array in _ARRAY.findall(operands[1])]
    (queries, length, width), keys = q, k[1]
    # Half of the scores are those of earlier tokens; blocks on the diagonal are computed whole, and the longer side of a block sets
    # how many there are.
    seen = (1 + 1 / min(size for size in blocks if size > 1)) / 2 if max(blocks) > 1 else 1.0
    flops = int(products * 2 * queries * length * keys * width * seen)
    return KernelCost(flops, bytes_of(operands[1]) + bytes_of(instruction.type))


def permuted_numbers(instruction: Instruction) -> int:
    """Numbers that a kernel of `pallas_kernels.permutation` puts in order, in all its passes over them; 0 for other instructions."""
    if instruction.opcode != "custom-call" or not instruction.name.startswith(_PERMUTATIONS):
        return 0
    numbers = shape_of(instruction.type)[0]
    return numbers * -(-numbers // WINDOW)


def product_flops(program: Program) -> tuple[float, float]:
    """FLOPs of one step in products of matrices, and in Pallas kernels. Element-wise work is not counted."""
    times = executions(program)
    products = kernels = 0.0
    for name, instructions in program.items():
        for instruction in instructions.values():
            if instruction.opcode in ("convolution", "dot"):
                products += times[name] * _product(instruction, instructions)
            elif cost := kernel_cost(instruction):
                kernels += times[name] * cost.flops
    return products, kernels


def _product(instruction: Instruction, siblings: Computation) -> int:
    """FLOPs of a product. On TPUs one is a convolution whose spatial dimensions may be those of a batch, padded and dilated so that
    every output has one tap that is not padding: only such taps count."""
    output = shape_of(instruction.type)
    lhs, rhs = (shape_of(siblings[name].type) for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        found = _CONTRACTED.search(instruction.attributes)
        return 2 * math.prod(output) * math.prod(lhs[int(dim)] for dim in (found[1] if found else "").split(",") if dim)
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, instruction.attributes[:200]
    window = _window(instruction.attributes, count=len(output) - 2)
    flops = 2 * output[labels[3].index("b")] * output[labels[3].index("f")] * rhs[labels[2].index("i")]
    for dim, (size, stride, low, lhs_dilation, rhs_dilation) in enumerate(window):
        places = (np.arange(output[labels[3].index(str(dim))]) * stride - low)[:, None] + np.arange(size) * rhs_dilation
        inside = (places >= 0) & (places <= (lhs[labels[1].index(str(dim))] - 1) * lhs_dilation) & (places % lhs_dilation == 0)
        flops *= int(inside.sum())
    return flops


def _window(attributes: str, count: int) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, low padding and dilations of both sides, for each spatial dimension."""
    found = _WINDOW.search(attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(name: str, default: str) -> list[int]:
        return [int(value.partition("_")[0]) for value in fields.get(name, "x".join([default] * count)).split("x") if value]

    names = (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    return list(zip(*(values(name, default) for name, default in names), strict=True))  # type: ignore[arg-type]


def traffic(program: Program) -> float:
    """Bytes that the step reads from HBM and writes to it. What stays in vector memory is not counted, nor the parts of an array
    that a slice leaves alone."""
    times = executions(program)
    return sum(
        times[name] * moved(instruction, program[name], program)
        for name in control_flow(program)
        for instruction in program[name].values()
        if instruction.opcode not in _FREE
    )


def moved(instruction: Instruction, siblings: Computation, program: Program) -> int:
    """Bytes that an instruction of `program[...] = siblings` reads from HBM and writes to it."""
    if _ALLOCATION in instruction.attributes:
        return 0
    if cost := kernel_cost(instruction):
        return cost.bytes
    inner = next((program[called] for how, called in instruction.called if how == "calls"), {}) if instruction.opcode == "fusion" else {}
    parameters = {i.number: i for i in inner.values() if i.opcode == "parameter"}
    total = 0
    for place, name in enumerate(instruction.operands):
        operand = siblings.get(name)
        total += 0 if operand is None else _read(parameters.get(place), inner, operand.type)
    root = next((i for i in inner.values() if i.root), instruction)
    written = [inner[name] for name in root.operands if name in inner] if root.opcode == "tuple" else [root]
    for result in written:
        if result.opcode == "dynamic-update-slice":
            total += in_hbm(inner[result.operands[1]].type if inner else siblings[result.operands[1]].type)
        elif result.opcode != "parameter":
            total += in_hbm(result.type if inner and result is not root else instruction.type)
    return total


def _read(parameter: Instruction | None, inner: Computation, type_text: str) -> int:
    """Bytes of an operand that a fusion reads: the slices that it takes of it, if it takes nothing else."""
    if parameter is None:
        return in_hbm(type_text)
    users = [i for i in inner.values() if parameter.name in i.operands]
    if users and all(i.opcode == "dynamic-slice" for i in users):
        return sum(in_hbm(i.type) for i in users) if in_hbm(type_text) else 0
    if users and all(i.opcode == "dynamic-update-slice" and i.operands[0] == parameter.name for i in users):
        return 0
    return in_hbm(type_text)


def in_hbm(type_text: str) -> int:
    """Bytes of the arrays of a type that are not in another memory (`S(1)` in their layout is vector memory)."""
    return sum(bytes_of(array) for array in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", type_text) if ":" not in array or "S(" not in array)
