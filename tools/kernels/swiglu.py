"""Gate and up projection with SwiGLU and the rows' weights: the fused kernel, the product followed by XLA's elementwise pass, and the
kernel of SwiGLU's gradients."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, grouped_product
from pallas_kernels.grouped_product import ProductTiling
from pallas_kernels.swiglu_gradient import block_rows, swiglu_gradient
from pallas_kernels.tiling import WEIGHT, product_tiling
from tools.kernels import ours
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.products import GROUPS, PRODUCTS, group_sizes
from tools.kernels.simulate import Program, Step

_PRODUCT = PRODUCTS["up_fwd"]
_HIDDEN = _PRODUCT.n // 2
_ROWS = (8192, 32768, 65536)
_BYTES, _WEIGHT_BYTES = 2, 4  # of a bfloat16, and of a row's weight


def cases(_chip: Chip) -> list[Case]:
    """Fused and not, for random sizes of groups. The least work moves rows, matrices and the hidden rows once."""
    found = []
    for rows in _ROWS:
        moved = _BYTES * (rows * (_PRODUCT.k + _HIDDEN) + GROUPS * _PRODUCT.k * _PRODUCT.n)
        work = Work(_PRODUCT.work(rows).flops, float(moved))
        for name, launch, program in (("swiglu", _launch_fused, _fused), ("product, then swiglu", _launch_product, _product)):
            found.append(Case(f"{name}, {rows} rows", functools.partial(launch, rows), work, functools.partial(program, rows)))
    return found


def _fused_tiling(rows: int, chip: Chip) -> ProductTiling:
    return product_tiling(chips.CHIPS[chip.name], rows, _PRODUCT.k, _HIDDEN, GROUPS, _BYTES, _BYTES, gated=True)


def _launch_fused(rows: int, chip: Chip) -> Launch:
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, _PRODUCT.k), (GROUPS, _PRODUCT.k, _PRODUCT.n), (rows,))]
    return Launch(functools.partial(_call, _fused_tiling(rows, chip)), (*operands, jax.ShapeDtypeStruct((GROUPS,), jnp.int32)))


def _call(tiling: ProductTiling, lhs, rhs, weights, sizes):  # type: ignore[no-untyped-def]
    return grouped_product.grouped_swiglu(lhs, rhs, weights, sizes, jnp.int32(0), dtype=jnp.dtype(jnp.bfloat16), tiling=tiling)


def _fused(rows: int, chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """XLA spreads the weights over a register's width first."""
    sizes, tiling = group_sizes(rows, "rnd"), _fused_tiling(rows, chip)
    spread = Step(issues=(("spread", float(rows * WEIGHT / chip.cores)),))
    cut = ours.BlockBytes(
        _PRODUCT.k * _BYTES + WEIGHT, _HIDDEN // tiling.panels * _BYTES, _PRODUCT.k * _PRODUCT.n // tiling.panels * _BYTES
    )
    return _around(spread, ours.block_program(tiling, cut, chip, compilation, sizes), None)


def _launch_product(rows: int, chip: Chip) -> Launch:
    return ours.grouped_matmul(chip, _PRODUCT, rows)[0].launch(chip)


def _product(rows: int, chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """The elementwise pass reads gate and up and writes the hidden rows at the bandwidth of the HBM."""
    program = ours.grouped_matmul(chip, _PRODUCT, rows)[0].program
    assert program is not None
    elementwise = Step(issues=(("elementwise", float(rows * 3 * _HIDDEN * _BYTES / chip.cores)),))
    return _around(None, program(chip, compilation, group_sizes(rows, "rnd")), elementwise)


def _around(before: Step | None, program: Program, behind: Step | None) -> Program:
    return Program(tuple(([before] if before else []) + list(steps) + ([behind] if behind else []) for steps in program.cores))


def gradients(_chip: Chip) -> list[Case]:
    """The kernel of SwiGLU's gradients. The least work reads gate, up, the result's gradient and the weights, and writes the gradients of
    all but the third, and the hidden rows."""
    rows = _ROWS[-1]
    gate_up, grad = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for width in (_PRODUCT.n, _HIDDEN))
    work = Work(0.0, float(rows * block_rows(_PRODUCT.n, _BYTES)[1]))
    launch = Launch(swiglu_gradient, (gate_up, jax.ShapeDtypeStruct((rows,), jnp.float32), grad))
    return [Case(f"gradient of swiglu, {rows} rows", lambda _chip: launch, work, functools.partial(_gradients, rows))]


def _gradients(rows: int, chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
    """A visit per block of rows."""
    block, row = block_rows(_PRODUCT.n, _BYTES)
    read = float(block * (_BYTES * (_PRODUCT.n + _HIDDEN) + _WEIGHT_BYTES))
    (loop,) = (region for region in compilation.main.root.children if region.kind == "loop")
    visits = [Visit(loop.total.cycles, 0.0, {"in": (i, read)}, (i, block * row - read)) for i in range(math.ceil(rows / block))]
    cores = (pipelined([visits[i] for i in share], {"in": 2}) for share in np.array_split(np.arange(len(visits)), chip.cores))
    return Program(tuple(cores))
