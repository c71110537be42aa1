"""Choice of tiles by a small model of vector memory, memory traffic and matrix-unit time of a chip; no tuning runs.

What was found good by other means may be entered in TABLE, which is asked first.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from pallas_kernels.chips import MIB, Chip
from pallas_kernels.grouped_outer import OuterTiling
from pallas_kernels.grouped_product import READ_AHEAD, ProductTiling
from pallas_kernels.row_blocks import PACK, BlockCost, best_sums

# (chip, kernel, rows, depth, columns, groups, bytes of an operand's element) -> tiling; kernels: product, transposed, outer.
TABLE: dict[tuple[str, str, int, int, int, int, int], ProductTiling | OuterTiling] = {}

# Sets of block sizes that cover any number of rows with little waste, fewest code first; by depth of the matrix units. Found by
# search over random groups of 100 to 2,000 rows.
PRODUCT_BLOCKS = {
    128: ((48, 80, 256), (48, 80, 144, 384)),
    256: ((128, 176, 288), (128, 144, 192, 256, 512), (128, 176, 288, 512, 1024)),
}
TRANSPOSED_BLOCKS = {
    128: ((64, 80, 256), (80, 128, 144, 384)),
    256: ((256, 352), (256, 320, 416), (256, 304, 384, 512), (256, 304, 384, 512, 768)),
}
STEP = 170  # cycles of a step besides its products
TYPICAL_SIZES = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)  # of groups, in units of their mean
RESERVED = 3 * MIB  # of vector memory: for what the compiler spills


class DoesNotFit(ValueError):
    """No tiling of these shapes fits the chip's vector memory."""


def product_tiling(
    chip: Chip, num_rows: int, depth: int, num_columns: int, num_groups: int, itemsize: int, out_itemsize: int, *, transposed: bool
) -> ProductTiling:
    """Tiling of `grouped_product` of [num_rows, depth] with [num_groups, depth, num_columns].

    Raises:
      DoesNotFit: not even one chunk of a matrix and the smallest block of rows do.
    """
    kernel = "transposed" if transposed else "product"
    key = (chip.name, kernel, num_rows, depth, num_columns, num_groups, itemsize)
    if key in TABLE:
        return TABLE[key]  # type: ignore[return-value]
    return _product_tiling(chip, num_rows / num_groups, depth, num_columns, itemsize, out_itemsize, transposed)


@functools.cache
def _product_tiling(
    chip: Chip, group_rows: float, depth: int, num_columns: int, itemsize: int, out_itemsize: int, transposed: bool
) -> ProductTiling:
    sets = (TRANSPOSED_BLOCKS if transposed else PRODUCT_BLOCKS)[chip.depth]
    found = None
    for panels in _panels(chip, num_columns):
        panel = num_columns // panels
        cost = _product_cost(chip, depth, panel, itemsize, transposed)
        columns = _largest_divisor(panel, 512)
        per_panel = panel // columns
        for sizes in sets:
            block = max(sizes)
            rows_bytes = block * ((READ_AHEAD + 1) * depth * itemsize + 2 * panel * out_itemsize) + PACK * panel * out_itemsize
            chunks = (chip.vmem - RESERVED - rows_bytes) // (columns * depth * itemsize)
            # Half a matrix ahead at least; three matrices are as many as ever help.
            if chunks < -(-3 * per_panel // 2):
                continue
            modelled = _row_cycles(sizes, cost, group_rows) * panels
            # More code must be worth it.
            if found is None or modelled < 0.99 * found[0]:
                found = modelled, ProductTiling(sizes, columns, panels, min(chunks, 4 * per_panel), cost, chip.vmem - MIB)
        if found:
            return found[1]
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
    panels = next(iter(_panels(chip, num_columns)))
    panel = num_columns // panels
    found = None
    for columns in (c for c in range(128, panel + 1, 128) if panel % c == 0):
        cost = BlockCost(_per_row(chip, depth, columns, itemsize), 0, chip.region_overhead + 150 + STEP)
        for most in (2, 3, 4, 6):
            sizes = tuple(chip.depth * i for i in range(1, most + 1))

            def memory(read_ahead: int, results: int, block: int = max(sizes), columns: int = columns) -> int:
                rows = (read_ahead + 1) * block * (depth + columns) * itemsize
                transposed = 3 * block * depth * itemsize // 2
                return rows + results * depth * columns * out_itemsize + depth * columns * 4 + transposed + RESERVED

            if memory(1, 2) > chip.vmem:
                continue
            modelled = _row_cycles(sizes, cost, group_rows) * (panel // columns)
            if found is None or modelled < 0.99 * found[0]:
                depths = [pair for pair in itertools.product((1, 2, 3), (2, 3, 4)) if memory(*pair) <= chip.vmem]
                read_ahead, results = max(depths, key=lambda pair: (min(pair[0] + 1, pair[1]), pair[1]))
                found = modelled, OuterTiling(sizes, columns, panels, read_ahead, results, cost, chip.vmem - MIB)
    if found is None:
        raise DoesNotFit(
            f"a weight gradient [{depth}, {num_columns}] of {itemsize}-byte rows does not fit the {chip.vmem // MIB} MiB of vector "
            f"memory of {chip.name}; split its depth or use a narrower dtype."
        )
    return found[1]


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
    per_row = _per_row(chip, depth, panel, itemsize)
    overhead = chip.region_overhead + STEP
    if not transposed:
        return BlockCost(per_row, chip.min_rows, overhead)
    if chip.depth == 128:
        return BlockCost(per_row, chip.min_rows + 16, overhead)
    # Stationary matrices that are transposed on their way take the transpose unit: read off schedules of 128 to 256 rows.
    return BlockCost(per_row, chip.min_rows, overhead + 70, load=112 * per_row, load_per_row=0.59 * per_row)


def _row_cycles(sizes: tuple[int, ...], cost: BlockCost, group_rows: float) -> float:
    """Modelled cycles per row for groups of typical sizes."""
    sums, total, rows = best_sums(sizes, cost), 0.0, 0.0
    for factor in TYPICAL_SIZES:
        group = group_rows * factor
        packs = int(np.ceil(group / PACK + 0.5))
        whole = max(0, -(-(packs - len(sums) + 1) // (max(sizes) // PACK)))
        tail = sums[packs - whole * max(sizes) // PACK]
        total += whole * cost(max(sizes)) + sum(cost(sizes[i]) for i in tail if i >= 0)
        rows += group
    return total / rows
