"""The routing kernels at the released model's sizes, and the same in plain jax.numpy as XLA compiles it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.routing import BLOCK, UNROLLED, route, route_gradient
from pallas_kernels.routing_reference import CHUNK, route_reference
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.simulate import Program, Step

_EXPERTS, _GROUPS = 512, 8
_SIZES = ((4096, 1), (8192, 1), (4096, 2))  # tokens of a device, choices per group


def cases() -> list[Case]:
    """Choice and gradient. The least work is to read the logits once, and to write their gradient once."""
    found = []
    for tokens, chosen in _SIZES:
        logits, slots = 4 * _EXPERTS, 4 * _GROUPS * chosen  # bytes of a token
        contenders: list[tuple[str, Any, int, int, Any]] = [
            ("route", _route(route, chosen), logits, 3 * slots, _kernel),
            ("route gradient", functools.partial(route_gradient, groups=_GROUPS), logits + 2 * slots, logits, _kernel),
        ]
        if (tokens, chosen) == _SIZES[0]:  # XLA takes up to a minute for each
            plain = _route(route_reference, chosen)
            contenders += [
                ("plain route", plain, logits, 3 * slots, _estimated),
                ("plain route gradient", functools.partial(_gradient, plain), logits + 2 * slots, logits, _estimated),
            ]
        for name, function, read, written, program in contenders:
            launch = functools.partial(_launch, function, tokens, chosen)
            work = Work(0.0, float(tokens * (read + written)))
            found.append(
                Case(f"{name}, {tokens} tokens, {chosen} per group", launch, work, functools.partial(program, tokens, read, written))
            )
    return found


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
    loops = [region for region in compilation.main.root.walk() if region.kind == "loop"]
    grid, chunks = loops[0], loops[-1]
    cycles = grid.total.cycles + chunks.total.cycles * (BLOCK // CHUNK // UNROLLED - 1)
    blocks = math.ceil(tokens / BLOCK)
    visits = [Visit(cycles, 0.0, {"in": (i, float(read * BLOCK))}, (i, float(written * BLOCK))) for i in range(blocks)]
    shares = np.array_split(np.arange(blocks), chip.cores)
    return Program(tuple(pipelined([visits[i] for i in share], {"in": 2}) for share in shares))


def _estimated(_tokens: int, _read: int, _written: int, _chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """XLA's own estimate of its fusions, one after the other; operations for which it has none are not counted."""
    return Program(((Step(compilation.estimated_cycles),),))
