"""This project's grouped products: how they are called, and what they do step by step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, grouped_outer, grouped_product, row_blocks
from pallas_kernels.grouped_outer import OuterTiling
from pallas_kernels.grouped_product import ProductTiling
from pallas_kernels.tiling import outer_tiling, product_tiling
from tools.kernels.cases import Case
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.peers import grid_loop
from tools.kernels.products import GROUPS, Product
from tools.kernels.schedule import Region, ScheduleError
from tools.kernels.simulate import Program, Step, Transfer

_ROWS = 8192  # compiled for; neither code nor schedule depends on the number of rows
_BYTES = 2  # of a bfloat16


def grouped_matmul(chip: Chip, product: Product, rows: int) -> list[Case]:
    """One case: the tiling that the kernel chooses for itself."""
    of_chip = chips.CHIPS[chip.name]
    if product.kind == "weight_gradient":
        outer = outer_tiling(of_chip, rows, product.k, product.n, GROUPS, _BYTES, _BYTES)
        blocks = "/".join(str(outer.unit * n) for n in range(1, outer.units + 1))
        return [_case(product, rows, outer, blocks, (outer.slots, outer.results), _call_outer, _outer_program)]
    transposed = product.kind == "input_gradient"
    tiling = product_tiling(of_chip, rows, product.k, product.n, GROUPS, _BYTES, _BYTES, transposed=transposed)
    blocks, buffers = "/".join(map(str, tiling.block_rows)), (tiling.matrices, tiling.read_ahead, tiling.results)
    return [_case(product, rows, tiling, blocks, buffers, _call_product, _product_program)]


def _case(product: Product, rows: int, tiling, blocks: str, buffers: tuple[int, ...], call, program) -> Case:  # type: ignore[no-untyped-def]
    name = f"ours {product.name} {blocks} x {tiling.columns}, buffers {'/'.join(map(str, buffers))}"
    launch = functools.partial(_launch, functools.partial(call, product, tiling), product)
    return Case(name, launch, product.work(rows), functools.partial(program, product, tiling), product.least_flops)


def _launch(call, product: Product, chip: Chip) -> Launch:  # type: ignore[no-untyped-def]
    matrices = (GROUPS, product.k, product.n)
    rhs = {"forward": matrices, "input_gradient": (GROUPS, product.n, product.k), "weight_gradient": (_ROWS, product.n)}[product.kind]
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((_ROWS, product.k), rhs))
    return Launch(call, (*shapes, jax.ShapeDtypeStruct((GROUPS,), jnp.int32)))


def _call_product(product: Product, tiling: ProductTiling, lhs, rhs, sizes):  # type: ignore[no-untyped-def]
    transposed = product.kind == "input_gradient"
    return grouped_product.grouped_product(
        lhs, rhs, sizes, jnp.int32(0), transposed=transposed, dtype=jnp.dtype(jnp.bfloat16), tiling=tiling
    )


def _call_outer(product: Product, tiling: OuterTiling, lhs, rhs, sizes):  # type: ignore[no-untyped-def]
    return grouped_outer.grouped_outer(lhs, rhs, sizes, dtype=jnp.dtype(jnp.bfloat16), tiling=tiling)


@dataclasses.dataclass(frozen=True)
class BlockBytes:
    """Of a row that is read, of a row's result in a panel, and of a panel of a matrix."""

    row: int
    result: int
    matrix: int


def _product_program(product: Product, tiling: ProductTiling, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    panel = product.n // tiling.panels
    return block_program(tiling, BlockBytes(product.k * _BYTES, panel * _BYTES, product.k * panel * _BYTES), chip, compilation, sizes)


def block_program(tiling: ProductTiling, of: BlockBytes, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    """A step per block of rows."""
    loop = grid_loop(compilation.main)
    hot = [region for region in loop.walk() if region.own.matmuls]
    if len(hot) != len(tiling.block_rows):
        raise ScheduleError(f"{len(hot)} stretches of products for {len(tiling.block_rows)} sizes of blocks:\n{loop.tree()}")
    cycles = [_path_cycles(loop, region) for region in hot]
    cut = row_blocks.cut_rows(jnp.asarray(sizes, jnp.int32), int(sizes.sum()), tiling.block_rows, tiling.cost)
    num_blocks, num_groups = map(int, cut.counts)
    blocks = np.asarray(cut.blocks)[:, :num_blocks]

    def steps(part: int) -> Iterator[Step]:
        def matrix(group: int) -> Iterator[Transfer]:
            if group < num_groups:
                yield ("matrix", part, group), float(of.matrix)

        def rows(block: int) -> Iterator[Transfer]:
            if block < num_blocks:
                yield ("rows", part, block), float(blocks[row_blocks.READ, block]) * of.row

        def result(block: int) -> Iterator[Transfer]:
            if block >= 0 and blocks[row_blocks.WRITE, block]:
                yield ("result", part, block), float(blocks[row_blocks.WRITE, block]) * of.result

        first = [
            transfer
            for ahead in range(max(tiling.matrices, tiling.read_ahead + 1))
            for transfer in (
                *(rows(ahead) if ahead <= tiling.read_ahead else ()),
                *(matrix(ahead) if ahead < tiling.matrices else ()),
            )
        ]
        yield Step(compilation.main.root.own.cycles, issues=tuple(first))
        for block in range(num_blocks):
            group, size = int(blocks[row_blocks.GROUP, block]), blocks[row_blocks.SIZE, block]
            waits = [("rows", part, block), *(name for name, _ in result(block - tiling.results))]
            if block == 0 or group != blocks[row_blocks.GROUP, block - 1]:
                waits.append(("matrix", part, group))
            is_last = block + 1 == num_blocks or group != blocks[row_blocks.GROUP, block + 1]
            starts = (*rows(block + tiling.read_ahead + 1), *result(block), *(matrix(group + tiling.matrices) if is_last else ()))
            flops = 2.0 * tiling.block_rows[size] * of.matrix / _BYTES
            yield Step(cycles[size], tuple(waits), (), starts, flops)

    return _on_cores(chip, tiling.panels, steps)


def _outer_program(product: Product, tiling: OuterTiling, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    """A step per visit: what it waits for, then its run, at whose end copies start."""
    loop = grid_loop(compilation.main)
    hot = [region for region in loop.walk() if region.own.matmuls]
    if len(hot) != len(tiling.runs):
        raise ScheduleError(f"{len(hot)} stretches of products for {len(tiling.runs)} runs:\n{loop.tree()}")
    cycles = [_path_cycles(loop, region) for region in hot]

    tiles = product.n // tiling.panels // tiling.columns
    plan = grouped_outer.plan_visits(jnp.asarray(sizes, jnp.int32), int(sizes.sum()), tiles, tiling)
    num_visits, visits = int(plan.count[0]), np.asarray(plan.visits)
    block = np.cumsum(visits[grouped_outer.READS_LEFT]) - 1
    tile = np.cumsum(visits[grouped_outer.RUN] > 0) - 1

    def steps(part: int) -> Iterator[Step]:
        def reads(visit: int) -> Iterator[Transfer]:
            rows = float(visits[grouped_outer.READ, visit])
            if visits[grouped_outer.READS_LEFT, visit]:
                yield ("left", part, int(block[visit])), rows * product.k * _BYTES
            if rows:
                yield ("right", part, visit), rows * tiling.columns * _BYTES

        yield Step(compilation.main.root.own.cycles, issues=tuple(read for visit in range(tiling.slots) for read in reads(visit)))
        for visit in range(num_visits):
            waits = [name for name, _ in reads(visit)]
            if visits[grouped_outer.REUSES, visit]:
                waits.append(("result", part, int(tile[visit]) - tiling.results))
            index = int(visits[grouped_outer.RUN, visit])
            run = tiling.runs[index]
            result = ((("result", part, int(tile[visit])), float(product.k * tiling.columns * _BYTES)),) if run.gives else ()
            flops = 2.0 * run.units * tiling.unit * product.k * tiling.columns
            yield Step(cycles[index], tuple(waits), (), (*result, *reads(visit + tiling.slots)), flops)

    return _on_cores(chip, tiling.panels, steps)


def _path_cycles(region: Region, hot: Region) -> int:
    """One pass through `region` that goes through `hot`, and through all regions inside that hold no products."""
    return region.own.cycles + sum(
        _path_cycles(child, hot) if child.start <= hot.start and hot.end <= child.end else child.total.cycles
        for child in region.children
        if not child.total.matmuls or (child.start <= hot.start and hot.end <= child.end)
    )


def _on_cores(chip: Chip, panels: int, steps) -> Program:  # type: ignore[no-untyped-def]
    """Panels one after the other, as many at a time as there are cores."""
    return Program(tuple(tuple(step for part in range(core, panels, chip.cores) for step in steps(part)) for core in range(chip.cores)))
