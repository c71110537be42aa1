"""Norm and rotary encoding of queries and keys at the released model's sizes, and plain jax.numpy as XLA compiles it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from interns1pro_jax.ops.rotary import norm_and_rotary_reference
from pallas_kernels import rotary
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.simulate import Program, Step

_QUERIES, _KEYS, _EPS = 64, 4, 1e-6
_ROWS, _TOKENS = 3, 4096
_TOKEN = 2 * rotary.LANES  # bytes of a head of a token


def cases(_chip: Chip) -> list[Case]:
    """Forward and backward, with tables for every key head. The least work moves every operand and result once."""
    found = []
    for name, copies in (("norm and rotary", 2), ("gradient of norm and rotary", 3)):
        moved = float(_ROWS * _TOKENS * _TOKEN * (copies * (_QUERIES + _KEYS) + 2 * _KEYS))
        for kind, function, program in (("", _kernel, _grid), ("plain ", _plain, _estimated)):
            launch = functools.partial(_launch, function, copies == 3)
            found.append(Case(f"{kind}{name}, {_ROWS} x {_TOKENS} tokens", launch, Work(0.0, moved), functools.partial(program, copies)))
    return found


def _kernel(q, k, q_norm, k_norm, cos, sin):  # type: ignore[no-untyped-def]
    return rotary.norm_and_rotary(q, k, q_norm, k_norm, cos, sin, eps=_EPS)


def _plain(q, k, q_norm, k_norm, cos, sin):  # type: ignore[no-untyped-def]
    q, k = (jnp.swapaxes(x, 1, 2) for x in (q, k))
    q, k = norm_and_rotary_reference(q, k, q_norm, k_norm, cos, sin, eps=_EPS)
    return jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)


def _gradient(function, grads, *operands):  # type: ignore[no-untyped-def]
    return jax.vjp(lambda *trained: function(*trained, *operands[4:]), *operands[:4])[1](grads)


def _launch(function, gradient: bool, _chip: Chip) -> Launch:  # type: ignore[no-untyped-def]
    q, k = (jax.ShapeDtypeStruct((_ROWS, heads, _TOKENS, rotary.LANES), jnp.bfloat16) for heads in (_QUERIES, _KEYS))
    norm = jax.ShapeDtypeStruct((rotary.LANES,), jnp.float32)
    operands = (q, k, norm, norm, k, k)
    return Launch(functools.partial(_gradient, function), ((q, k), *operands)) if gradient else Launch(function, operands)


def _grid(copies: int, chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """A visit per block of tokens and key head: the loop over its chunks, and what is around it."""
    token = _TOKEN * (copies * (_QUERIES // _KEYS + 1) + 2)
    tokens = rotary.block_tokens(_TOKENS, token)
    loops = [region for region in compilation.main.root.walk() if region.kind == "loop"]
    cycles = loops[0].total.cycles + loops[-1].total.cycles * (tokens // rotary.CHUNK - 1)
    written = float(tokens * _TOKEN * (_QUERIES // _KEYS + 1))
    visits = [Visit(cycles, 0.0, {"in": (i, tokens * token - written)}, (i, written)) for i in range(_ROWS * _TOKENS // tokens * _KEYS)]
    return Program(tuple(pipelined([visits[i] for i in share], {"in": 2}) for share in np.array_split(np.arange(len(visits)), chip.cores)))


def _estimated(_copies: int, _chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """XLA's own estimate of its fusions, one after the other; operations for which it has none are not counted."""
    return Program(((Step(compilation.estimated_cycles),),))
