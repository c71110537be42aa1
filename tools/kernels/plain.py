"""A plain Pallas matrix product: its work is known, so it shows whether schedules are read rightly."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.simulate import Program

_SIZE = 4096
_TILINGS = ((512, 512, 512), (512, 1024, 1024), (1024, 512, 1024))


def cases(_chip: Chip) -> list[Case]:
    """Products of two [4096, 4096] matrices in tiles of rows, contracted and result's columns."""
    work = Work(2.0 * _SIZE**3, 2.0 * 3 * _SIZE**2)
    return [
        Case(
            f"plain {','.join(map(str, tiling))}",
            functools.partial(_launch, tiling),
            work,
            functools.partial(_program, tiling),
        )
        for tiling in _TILINGS
    ]


def _launch(tiling: tuple[int, int, int], chip: Chip) -> Launch:
    tile_m, tile_k, tile_n = tiling

    def kernel(x, w, y, sums):  # type: ignore[no-untyped-def]
        @pl.when(pl.program_id(2) == 0)
        def _clear():  # type: ignore[no-untyped-def]
            sums[...] = jnp.zeros_like(sums)

        sums[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == _SIZE // tile_k - 1)
        def _store():  # type: ignore[no-untyped-def]
            y[...] = sums[...].astype(y.dtype)

    matrix = jax.ShapeDtypeStruct((_SIZE, _SIZE), jnp.bfloat16)
    function = pl.pallas_call(
        kernel,
        out_shape=matrix,
        grid=(_SIZE // tile_m, _SIZE // tile_n, _SIZE // tile_k),
        in_specs=[pl.BlockSpec((tile_m, tile_k), lambda m, n, k: (m, k)), pl.BlockSpec((tile_k, tile_n), lambda m, n, k: (k, n))],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=32 << 20),
        name="plain",
    )
    return Launch(function, (matrix, matrix))


def _program(tiling: tuple[int, int, int], chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    tile_m, tile_k, tile_n = tiling
    loop = [region for region in compilation.main.root.walk() if region.kind == "loop"][-1]
    clear, store = [region.own.cycles for region in loop.walk() if region.kind == "branch" and not region.own.matmuls]
    always = loop.total.cycles - clear - store
    tiles_k = _SIZE // tile_k

    def visit(m: int, n: int, k: int) -> Visit:
        cycles = always + (clear if k == 0 else 0) + (store if k == tiles_k - 1 else 0)
        inputs = {"x": ((m, k), 2.0 * tile_m * tile_k), "w": ((k, n), 2.0 * tile_k * tile_n)}
        return Visit(cycles, 2.0 * tile_m * tile_k * tile_n, inputs, ((m, n), 2.0 * tile_m * tile_n))

    rows = np.array_split(np.arange(_SIZE // tile_m), chip.cores)
    shares = [[visit(int(m), n, k) for m in share for n in range(_SIZE // tile_n) for k in range(tiles_k)] for share in rows]
    return Program(tuple(pipelined(share, {"x": 2, "w": 2}) for share in shares))
