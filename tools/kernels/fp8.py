"""This project's grouped products in FP8, and what products by the FP8 matrix units would take.

Rooflines are of bfloat16 products: sums must be scaled for every 128 elements of the contraction, and with so few a matrix unit that
contracts 256 at a time is no faster in FP8. `scaled_sums` shows the rest: the vector units that scale and add.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, row_blocks, scaled_product
from pallas_kernels.scaled_product import BLOCK, ScaledTiling
from pallas_kernels.tiling import scaled_tiling
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.peers import grid_loop
from tools.kernels.products import GROUPS, Product
from tools.kernels.schedule import ScheduleError
from tools.kernels.simulate import Program, Step, Transfer

_ROWS = 8192  # compiled for; neither code nor schedule depends on the number of rows
_E4M3 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Fp8Product(Product):
    """Of e4m3 rows and matrices with scales, and results in bfloat16."""

    def work(self, rows: int) -> Work:
        elements, blocks = GROUPS * self.k * self.n, GROUPS * (self.k // BLOCK) * (self.n // BLOCK)
        return Work(2.0 * rows * self.k * self.n, rows * (self.k + 4.0 * self.k / BLOCK + 2 * self.n) + elements + 4.0 * blocks)


def products(of: Sequence[Product]) -> list[Fp8Product]:
    """Those of them that there are in FP8; weight gradients multiply dequantised rows."""
    return [Fp8Product(f"{p.name}_fp8", p.kind, p.k, p.n) for p in of if p.kind != "weight_gradient"]


def grouped_matmul_fp8(chip: Chip, product: Product, rows: int) -> list[Case]:
    """One case: the tiling that the kernel chooses for itself."""
    transposed = product.kind == "input_gradient"
    tiling = scaled_tiling(chips.CHIPS[chip.name], rows, product.k, product.n, GROUPS, 2, transposed=transposed)
    name = f"ours {product.name} {'/'.join(map(str, tiling.block_rows))} x {tiling.columns}"
    launch, program = functools.partial(_launch, product, tiling), functools.partial(_program, product, tiling)
    return [Case(name, launch, product.work(rows), program, product.least_flops)]


def _launch(product: Product, tiling: ScaledTiling, chip: Chip) -> Launch:
    transposed = product.kind == "input_gradient"
    rows, columns = (product.n, product.k) if transposed else (product.k, product.n)
    shapes = {
        (_ROWS, product.k): _E4M3,
        (_ROWS, product.k // BLOCK): jnp.float32,
        (GROUPS, rows, columns): _E4M3,
        (GROUPS, rows // BLOCK, columns // BLOCK): jnp.float32,
        (GROUPS,): jnp.int32,
    }

    def call(lhs, lhs_scale, rhs, rhs_scale, sizes):  # type: ignore[no-untyped-def]
        return scaled_product.scaled_product(
            lhs, lhs_scale, rhs, rhs_scale, sizes, jnp.int32(0), transposed=transposed, dtype=jnp.dtype(jnp.bfloat16), tiling=tiling
        )

    return Launch(call, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.items()))


def _program(product: Product, tiling: ScaledTiling, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    """A step per block of rows."""
    loop = grid_loop(compilation.main)
    hot = [region for region in loop.children if region.total.matmuls]
    if len(hot) != len(tiling.block_rows):
        raise ScheduleError(f"{len(hot)} stretches of products for {len(tiling.block_rows)} sizes of blocks:\n{loop.tree()}")
    always = loop.total.cycles - sum(region.total.cycles for region in hot)
    panel = product.n // tiling.panels
    pack = scaled_product.PACK
    cut = row_blocks.cut_rows(jnp.asarray(sizes, jnp.int32), -(-int(sizes.sum()) // pack) * pack, tiling.block_rows, tiling.cost, pack)
    num_blocks, num_groups = map(int, cut.counts)
    blocks = np.asarray(cut.blocks)[:, :num_blocks]
    row_bytes = product.k + 4 * BLOCK * -(-product.k // BLOCK**2)  # a row's scales take whole lines in memory

    def steps(part: int) -> Iterator[Step]:
        def matrix(group: int) -> Iterator[Transfer]:
            if group < num_groups:
                yield ("matrix", part, group), product.k * panel * (1 + 4 / BLOCK**2)

        def rows(block: int) -> Iterator[Transfer]:
            if block < num_blocks:
                yield ("rows", part, block), float(blocks[row_blocks.READ, block]) * row_bytes

        def result(block: int) -> Iterator[Transfer]:
            if block >= 0 and blocks[row_blocks.WRITE, block]:
                yield ("result", part, block), 2.0 * float(blocks[row_blocks.WRITE, block]) * panel

        first = [*(read for block in range(tiling.read_ahead) for read in rows(block))]
        first += [copy for group in range(tiling.matrices) for copy in matrix(group)]
        yield Step(compilation.main.root.own.cycles, issues=tuple(first))
        for block in range(num_blocks):
            group, size = int(blocks[row_blocks.GROUP, block]), blocks[row_blocks.SIZE, block]
            is_new = block == 0 or group != blocks[row_blocks.GROUP, block - 1]
            freed = matrix(group - 1 + tiling.matrices) if is_new and group else ()
            yield Step(issues=(*rows(block + tiling.read_ahead), *freed))
            waits = [("rows", part, block), *(name for name, _ in result(block - tiling.results))]
            waits += [("matrix", part, group)] if is_new else []
            flops = 2.0 * tiling.block_rows[size] * product.k * panel
            yield Step(always + hot[size].total.cycles, tuple(waits), (), tuple(result(block)), flops)

    parts = [range(core, tiling.panels, chip.cores) for core in range(chip.cores)]
    return Program(tuple(tuple(step for part in share for step in steps(part)) for share in parts))


def scaled_sums(_chip: Chip) -> list[Case]:
    """A product as the FP8 matrix units would make it, with everything in vector memory: only compiled."""
    return [
        Case(f"scaled sums {rows} rows", functools.partial(_launch_sums, rows), Work(2.0 * rows * 4096 * 512, 0.0)) for rows in (128, 256)
    ]


def _launch_sums(rows: int, chip: Chip) -> Launch:
    depth, num_columns, width = 4096, 512, 256

    def kernel(lhs, lhs_scale, rhs, rhs_scale, out):  # type: ignore[no-untyped-def]
        for column in range(0, num_columns, width):
            sums = jnp.zeros((rows, width), jnp.float32)
            for k in range(0, depth, BLOCK):
                product = jnp.dot(lhs[:, k : k + BLOCK], rhs[k : k + BLOCK, column : column + width], preferred_element_type=jnp.float32)
                of_rows = lhs_scale[:, k // BLOCK : k // BLOCK + 1]
                scales = [of_rows * rhs_scale[k // BLOCK, block] for block in range(column // BLOCK, (column + width) // BLOCK)]
                sums += product * jnp.concatenate([jnp.broadcast_to(scale, (rows, BLOCK)) for scale in scales], axis=1)
            out[:, column : column + width] = sums.astype(out.dtype)

    vmem, smem = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.SMEM)
    function = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, num_columns), jnp.bfloat16),
        in_specs=[vmem, vmem, vmem, smem],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 << 20),
        name="scaled_sums",
    )
    shapes = {
        (rows, depth): _E4M3,
        (rows, depth // BLOCK): jnp.float32,
        (depth, num_columns): _E4M3,
        (depth // BLOCK, num_columns // BLOCK): jnp.float32,
    }
    return Launch(function, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.items()))
