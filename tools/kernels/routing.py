"""The kernels of routing at the released model's sizes, and the router in plain jax.numpy as XLA compiles it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import permutation
from pallas_kernels.permutation import invert, permute
from pallas_kernels.routing import BLOCK, UNROLLED, route, route_gradient
from pallas_kernels.routing_reference import CHUNK, route_reference
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.simulate import Program, Step

_EXPERTS, _GROUPS = 512, 8
_SIZES = ((4096, 1), (8192, 1), (4096, 2))  # tokens of a device, choices per group


def cases(_chip: Chip) -> list[Case]:
    """Choice and gradient. The least work is to read the logits once, and to write their gradient once."""
    found = []
    for tokens, chosen in _SIZES:
        logits, slots = 4 * _EXPERTS, 4 * _GROUPS * chosen  # bytes of a token
        contenders: list[tuple[str, Any, int, int, Any]] = [
            ("route", _route(route, chosen), logits, 3 * slots, _kernel),
            ("route gradient", functools.partial(route_gradient, groups=_GROUPS), logits + 2 * slots, logits, _kernel),
        ]
        if (tokens, chosen) == _SIZES[0]:  # XLA takes long to compile them
            plain = _route(route_reference, chosen)
            contenders += [
                ("plain route", plain, logits, 3 * slots, _estimated),
                ("plain route gradient", functools.partial(_gradient, plain), logits + 2 * slots, logits, _estimated),
            ]
        for name, function, read, written, program in contenders:
            launch = functools.partial(_launch, function, tokens, chosen)
            program = functools.partial(program, tokens, read, written)
            found.append(Case(f"{name}, {tokens} tokens, {chosen} per group", launch, Work(0.0, float(tokens * (read + written))), program))
    return found + [_permutation(function, numbers) for numbers in (1 << 15, 1 << 16) for function in (permute, invert)]


def _permutation(function, numbers: int) -> Case:  # type: ignore[no-untyped-def]
    """A number for each slot of a device: the least work is to read it, or only where it goes, and to write it."""
    operands = 2 if function is permute else 1
    bytes_read = 4 * numbers * operands
    arguments = tuple(jax.ShapeDtypeStruct((numbers,), jnp.int32) for _ in range(operands))

    def program(_chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
        """A visit per block that is read; the result, which fits into one window, is written in the end. One core does it all."""
        blocks = numbers // permutation.BLOCK
        cycles = _grid_step(compilation, permutation.BLOCK // permutation.TOGETHER)
        visits = [Visit(cycles, 0.0, {"in": (i, bytes_read / blocks)}, (0, 4.0 * numbers)) for i in range(blocks)]
        return Program((pipelined(visits, {"in": 2}),))

    work = Work(0.0, bytes_read + 4.0 * numbers)
    return Case(f"{function.__name__} {numbers}", lambda _: Launch(function, arguments), work, program)


def _route(function, chosen: int):  # type: ignore[no-untyped-def]
    return functools.partial(function, groups=_GROUPS, chosen=chosen)


def _gradient(function, logits_TE, ids_TGC, upstream_TGC):  # type: ignore[no-untyped-def]
    """Of recorded choices, as the kernel's backward has them."""
    _, pullback = jax.vjp(lambda z: function(z, ids_TGC).probs_TGC, logits_TE)
    return pullback(upstream_TGC)


def _launch(function, tokens: int, chosen: int, _chip: Chip) -> Launch:  # type: ignore[no-untyped-def]
    slots = (tokens, _GROUPS, chosen)
    operands = [jax.ShapeDtypeStruct((tokens, _EXPERTS), jnp.float32)]
    if function.func in (route_gradient, _gradient):
        operands += [jax.ShapeDtypeStruct(slots, jnp.int32), jax.ShapeDtypeStruct(slots, jnp.float32)]
    return Launch(function, tuple(operands))


def _kernel(tokens: int, read: int, written: int, chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """A visit per block of tokens: the loop over its chunks, and everything around it."""
    cycles = _grid_step(compilation, BLOCK // CHUNK // UNROLLED)
    blocks = math.ceil(tokens / BLOCK)
    visits = [Visit(cycles, 0.0, {"in": (i, float(read * BLOCK))}, (i, float(written * BLOCK))) for i in range(blocks)]
    shares = np.array_split(np.arange(blocks), chip.cores)
    return Program(tuple(pipelined([visits[i] for i in share], {"in": 2}) for share in shares))


def _grid_step(compilation: Compilation, passes: int) -> int:
    """Cycles of a step of the grid, in which the inner loop makes so many passes, and all conditions hold."""
    loops = [region for region in compilation.main.root.walk() if region.kind == "loop"]
    return loops[0].total.cycles + loops[-1].total.cycles * (passes - 1)


def _estimated(_tokens: int, _read: int, _written: int, _chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """XLA's own estimate of its fusions, one after the other; operations for which it has none are not counted."""
    return Program(((Step(compilation.estimated_cycles),),))
