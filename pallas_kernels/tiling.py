"""Choice of tiles by a small model of vector memory, memory traffic and matrix-unit time of a chip; no tuning runs.

What was found good by other means may be entered in TABLE, which is asked first.
"""

from __future__ import annotations

import functools
import itertools
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from pallas_kernels import product_model
from pallas_kernels.chips import MIB, Chip
from pallas_kernels.grouped_outer import SLICE, OuterTiling
from pallas_kernels.grouped_product import ProductTiling
from pallas_kernels.row_blocks import PACK, BlockCost, best_sums
from pallas_kernels.scaled_product import PACK as SCALED_PACK
from pallas_kernels.scaled_product import ScaledTiling

# (chip, kernel, rows, depth, columns, groups, bytes of an operand's element) -> tiling; kernels: product, transposed, outer, scaled,
# scaled transposed.
TABLE: dict[tuple[str, str, int, int, int, int, int], ProductTiling | OuterTiling | ScaledTiling] = {}

# Sets of block sizes that cover any number of rows with little waste, fewest code first; by depth of the matrix units. Found by
# search over random groups of 100 to 2,000 rows.
PRODUCT_BLOCKS = {
    128: ((48, 80, 128), (48, 64, 96, 176, 320), (48, 80, 112, 176, 208, 288), (48, 96, 112, 144, 256, 320, 448)),
    256: (
        (128, 176, 288),
        (160, 176, 240, 288),
        (160, 208, 240, 288, 352),
        (144, 160, 192, 256, 384, 464),
        (128, 176, 208, 240, 304, 320, 416, 576),
    ),
}
TRANSPOSED_BLOCKS = {
    128: ((64, 80, 128), (64, 80, 96, 176), (64, 80, 96, 144, 256), (64, 80, 96, 112, 240, 304), (80, 112, 128, 144, 176, 336, 416)),
    256: (
        (256, 352),
        (256, 272, 304, 352),
        (272, 304, 352, 400, 464),
        (272, 288, 320, 368, 432, 496),
        (256, 272, 288, 336, 368, 416, 448, 496),
    ),
}
SCALED_BLOCKS = {
    128: ((96, 128, 160),),
    256: ((128, 160, 224), (160, 256, 320)),
}
OUTER_UNITS = (2, 3, 4, 5, 6)  # most rows of a block, in units of what the matrix units contract at once
OUTER_CODE = 1 << 16  # cycles of all its runs, each a bundle of code or less: some 4 MiB
OUTER_STEP = 170  # cycles of a visit of a weight gradient besides filling and draining; read off compiled schedules
PRODUCT_STEP = 70  # the same of a block of rows in a forward product or an input gradient
SCALED_STEP = 230  # and in a product with FP8 matrices
TYPICAL_SIZES = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)  # of groups, in units of their mean
RESERVED = 3 * MIB  # of vector memory: for what the compiler spills
# The same of a product, by the rows that a matrix unit holds: smaller units leave more sums to be kept. Read off compiled kernels.
PRODUCT_RESERVED = {128: 5 * MIB, 256: RESERVED}
WEIGHT = 512  # bytes of a row's weight in `grouped_swiglu`


Tiling = TypeVar("Tiling", ProductTiling, ScaledTiling)


class DoesNotFit(ValueError):
    """No tiling of these shapes fits the chip's vector memory."""


def product_tiling(
    chip: Chip,
    num_rows: int,
    depth: int,
    num_columns: int,
    num_groups: int,
    itemsize: int,
    out_itemsize: int,
    *,
    transposed: bool = False,
    gated: bool = False,
) -> ProductTiling:
    """Tiling of `grouped_product` of [num_rows, depth] with [num_groups, depth, num_columns], or `gated` of `grouped_swiglu` whose
    matrices have `num_columns` for the gate and as many for the up projection.

    Raises:
      DoesNotFit: not even one matrix and the smallest block of rows do.
    """
    kernel = "swiglu" if gated else "transposed" if transposed else "product"
    key = (chip.name, kernel, num_rows, depth, num_columns, num_groups, itemsize)
    if key in TABLE:
        return TABLE[key]  # type: ignore[return-value]
    return _product_tiling(chip, num_rows / num_groups, depth, num_columns, itemsize, out_itemsize, transposed, gated)


@functools.cache
def _product_tiling(
    chip: Chip, group_rows: float, depth: int, num_columns: int, itemsize: int, out_itemsize: int, transposed: bool, gated: bool
) -> ProductTiling:
    sizes_G, parts = _typical_sizes(group_rows), 2 if gated else 1
    row_bytes = depth * itemsize + (WEIGHT if gated else 0)
    found: list[tuple[float, ProductTiling]] = []
    for panels in _panels(chip, num_columns)[:2]:
        panel = num_columns // panels
        matrix_bytes, result_bytes = parts * panel * depth * itemsize, panel * out_itemsize
        cost = _product_cost(chip, depth, parts * panel, itemsize, transposed)
        columns = parts * _largest_divisor(panel, chip.chunk // parts)
        for sizes in (TRANSPOSED_BLOCKS if transposed else PRODUCT_BLOCKS)[chip.depth]:
            blocks = product_model.cut(sizes_G, sizes, cost)
            for matrices, read_ahead, results in itertools.product((2, 3, 4, 1), (1, 2, 3, 4, 6), (2, 3, 4, 8)):
                rings = matrices * matrix_bytes + max(sizes) * ((read_ahead + 1) * row_bytes + results * result_bytes)
                if rings + PRODUCT_RESERVED[chip.depth] <= chip.vmem:
                    tiling = ProductTiling(sizes, columns, panels, matrices, read_ahead, results, cost, chip.vmem - MIB)
                    seconds = product_model.seconds(chip, tiling, blocks, row_bytes, result_bytes, matrix_bytes)
                    found.append((seconds * (panels // chip.cores), tiling))
    if found:
        return _least_code(found)
    raise DoesNotFit(
        f"a grouped product with matrices [{depth}, {num_columns}] of {itemsize}-byte elements does not fit the {chip.vmem // MIB} MiB "
        f"of vector memory of {chip.name}; split the contraction or use a narrower dtype."
    )


def outer_tiling(chip: Chip, num_rows: int, depth: int, num_columns: int, num_groups: int, itemsize: int, out_itemsize: int) -> OuterTiling:
    """Tiling of `grouped_outer` of [num_rows, depth] with [num_rows, num_columns].

    Raises:
      DoesNotFit: not even the smallest blocks do.
    """
    key = (chip.name, "outer", num_rows, depth, num_columns, num_groups, itemsize)
    if key in TABLE:
        return TABLE[key]  # type: ignore[return-value]
    return _outer_tiling(chip, num_rows / num_groups, depth, num_columns, itemsize, out_itemsize)


@functools.cache
def _outer_tiling(chip: Chip, group_rows: float, depth: int, num_columns: int, itemsize: int, out_itemsize: int) -> OuterTiling:
    hbm = (group_rows * (depth + num_columns) * itemsize + depth * num_columns * out_itemsize) / chip.hbm
    panels = _panels(chip, num_columns)[0]
    panel = num_columns // panels
    found: list[tuple[float, float, OuterTiling]] = []
    for columns in (c for c in range(128, panel + 1, 128) if panel % c == 0):
        cost = BlockCost(_per_row(chip, depth, columns, itemsize), 0, chip.region_overhead + OUTER_STEP)
        for units, slots, results in itertools.product(OUTER_UNITS, (2, 3, 4, 5, 6), (2, 3, 4, 6)):
            block, tiles = units * chip.depth, panel // columns
            cycles, blocks, again = _outer_cycles(chip.depth, units, cost, group_rows)
            rings = slots * (block + PACK) * (depth + columns) * itemsize + results * depth * columns * out_itemsize
            in_a_run = block * (columns + 3 * SLICE // 2) * itemsize  # right rows without strangers, left rows of a slice transposed
            if rings + depth * columns * 4 + in_a_run + RESERVED > chip.vmem:
                continue
            adds_beside = 0 if chip.depth == 128 else 2
            tiling = OuterTiling(chip.depth, units, columns, panels, slots, results, adds_beside, chip.vmem - MIB)
            # Waits, for rows or for results to leave, matter only where compute and transfers are nearly alike.
            transfers = hbm + again * (tiles - 1) * depth * itemsize / chip.hbm
            shorter, longer = sorted((cycles * tiles * (panels // chip.cores) / chip.clock, transfers))
            groups_ahead = 1 / (1 / (slots - 1) + 1 / (results - 1)) / (tiles * blocks)
            code = sum(run.units for run in tiling.runs) * chip.depth * cost.per_row
            found.append((code, longer + 0.1 * shorter * (shorter / longer) ** 6 / groups_ahead, tiling))
    if not found:
        raise DoesNotFit(
            f"a weight gradient [{depth}, {num_columns}] of {itemsize}-byte rows does not fit the {chip.vmem // MIB} MiB of vector "
            f"memory of {chip.name}; split its depth or use a narrower dtype."
        )
    # Of those with little code (or of all, if none has) the one with the smallest blocks that takes hardly longer than the best.
    little = [(seconds, tiling) for code, seconds, tiling in found if code <= OUTER_CODE] or [of[1:] for of in found]
    best = min(seconds for seconds, _ in little)
    return min((of for of in little if of[0] <= 1.005 * best), key=lambda of: (of[1].units, of[0], -of[1].slots))[1]


def _outer_cycles(unit: int, units: int, cost: BlockCost, group_rows: float) -> tuple[float, float, float]:
    """Modelled cycles of a tile, number of blocks of a group, and rows that are read again for every further tile, since their group has
    several blocks; the mean over groups of typical sizes."""
    sizes = group_rows * np.array(TYPICAL_SIZES)
    rows = unit * np.ceil(sizes / unit)
    blocks = np.ceil(rows / (unit * units))
    cycles, again = (cost.per_row * rows + cost.overhead * blocks).sum(), sizes[blocks > 1].sum()
    return float(cycles / sum(TYPICAL_SIZES)), float(blocks.mean()), float(again / sum(TYPICAL_SIZES))


def scaled_tiling(
    chip: Chip, num_rows: int, depth: int, num_columns: int, num_groups: int, out_itemsize: int, *, transposed: bool
) -> ScaledTiling:
    """Tiling of `scaled_product` of [num_rows, depth] with [num_groups, depth, num_columns].

    Raises:
      DoesNotFit: not even one chunk of a matrix and the smallest block of rows do.
    """
    kernel = "scaled transposed" if transposed else "scaled"
    key = (chip.name, kernel, num_rows, depth, num_columns, num_groups, 1)
    if key in TABLE:
        return TABLE[key]  # type: ignore[return-value]
    return _scaled_tiling(chip, num_rows / num_groups, depth, num_columns, out_itemsize, transposed)


@functools.cache
def _scaled_tiling(chip: Chip, group_rows: float, depth: int, num_columns: int, out_itemsize: int, transposed: bool) -> ScaledTiling:
    row_bytes = depth + 512 * -(-depth // 16384)  # scales take whole lines of 128 in memory
    hbm = (group_rows * (row_bytes + num_columns * out_itemsize) + depth * num_columns) / chip.hbm
    vectors = jnp.dtype(jnp.bfloat16 if chip.bf16_vectors else jnp.float32)
    found: list[tuple[float, ScaledTiling]] = []
    for panels in _panels(chip, num_columns):
        panel = num_columns // panels
        cost = _scaled_cost(chip, depth, panel, transposed)
        columns = _largest_divisor(panel, 512)
        for sizes in SCALED_BLOCKS[chip.depth]:
            cycles, blocks = _group_cycles(sizes, cost, group_rows, SCALED_PACK)
            seconds = cycles * (panels // chip.cores) / chip.clock
            # As for products in bfloat16.
            for ahead, results in itertools.product((1, 2, 3), (2, 3, 4, 6, 8)):
                read_ahead = max(2, int(np.ceil(ahead * blocks)))
                rows = (read_ahead + 1) * row_bytes + results * panel * out_itemsize + 2 * depth
                memory = (ahead + 1) * panel * depth + max(sizes) * rows + SCALED_PACK * panel * out_itemsize + RESERVED
                if memory <= chip.vmem:
                    tiling = ScaledTiling(
                        sizes, columns, panels, ahead + 1, read_ahead, results, chip.native_fp8, vectors, cost, chip.vmem - MIB
                    )
                    found.append((_with_imbalance(seconds, hbm, min(ahead, results / blocks)), tiling))
        if found:
            return _least_code(found)
    raise DoesNotFit(
        f"a grouped product with FP8 matrices [{depth}, {num_columns}] does not fit the {chip.vmem // MIB} MiB of vector memory of "
        f"{chip.name}; split the contraction."
    )


def _with_imbalance(compute: float, transfers: float, groups_ahead: float) -> float:
    """Seconds of a group of mean size, when groups differ. Reading ahead evens out groups that are bound by compute and groups that are
    bound by transfers; the more alike the two are in the mean, the more is lost where it does not."""
    shorter, longer = sorted((compute, transfers))
    return longer + 0.1 * shorter * (shorter / longer) ** 2 / groups_ahead


def _least_code(found: list[tuple[float, Tiling]]) -> Tiling:
    """Of the tilings within half a percent of the best the one with the least code."""
    best = min(seconds for seconds, _ in found)
    return min((t for seconds, t in found if seconds <= 1.005 * best), key=lambda t: (sum(t.block_rows), -t.results, -t.read_ahead))


def _panels(chip: Chip, num_columns: int) -> list[int]:
    """Ways to part the columns, fewest first. One panel on a chip of two cores leaves one of them idle, so it comes last."""
    ways = [p for p in range(1, num_columns // 128 + 1) if num_columns % (128 * p) == 0]
    return [p for p in ways if p % chip.cores == 0] or ways


def _largest_divisor(panel: int, limit: int) -> int:
    return max(c for c in range(128, min(panel, limit) + 1, 128) if panel % c == 0)


def _per_row(chip: Chip, depth: int, columns: int, itemsize: int) -> float:
    """Cycles of a row; float32 products take six passes of bfloat16."""
    return -(-depth // chip.depth) * chip.depth * columns / chip.macs_per_cycle * (6 if itemsize == 4 else 1)


def _product_cost(chip: Chip, depth: int, panel: int, itemsize: int, transposed: bool) -> BlockCost:
    # Transposed matrices load at half the speed where the matrix units are 256 deep.
    min_rows = (chip.min_rows + 16 if chip.depth == 128 else 2 * chip.min_rows) if transposed else chip.min_rows
    return BlockCost(_per_row(chip, depth, panel, itemsize), min_rows, chip.region_overhead + PRODUCT_STEP)


def _typical_sizes(group_rows: float) -> np.ndarray:
    """Rows of some groups, of which half have between 0.7 and 1.4 times the median."""
    popularity = np.random.RandomState(0).lognormal(0, 0.5, 48)
    return np.maximum(1, np.round(popularity / popularity.mean() * group_rows)).astype(int)


def _scaled_cost(chip: Chip, depth: int, panel: int, transposed: bool) -> BlockCost:
    """The products, or what makes their matrices ready beside them: vector units dequantise, the transpose unit turns."""
    turned = transposed and chip.depth == 256 and not chip.native_fp8
    return BlockCost(
        _per_row(chip, depth, panel, 2),
        256 if turned else chip.min_rows,
        chip.region_overhead + SCALED_STEP,
        load=depth * panel / chip.dequantized,
        load_per_row=depth / chip.dequantized,
    )


def _group_cycles(sizes: tuple[int, ...], cost: BlockCost, group_rows: float, pack: int = PACK) -> tuple[float, float]:
    """Modelled cycles and number of blocks of a group, the mean over groups of typical sizes."""
    sums, cycles, blocks = best_sums(sizes, cost, pack), 0.0, 0.0
    for factor in TYPICAL_SIZES:
        packs = int(np.ceil(group_rows * factor / pack + 0.5))
        whole = max(0, -(-(packs - len(sums) + 1) // (max(sizes) // pack)))
        tail = [sizes[i] for i in sums[packs - whole * max(sizes) // pack] if i >= 0]
        cycles += whole * cost(max(sizes)) + sum(map(cost, tail))
        blocks += whole + len(tail)
    return cycles / sum(TYPICAL_SIZES), blocks / len(TYPICAL_SIZES)
