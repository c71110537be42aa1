"""Time of a grouped product by a small simulation: a block's products follow one another, copies queue for the HBM in order."""

from __future__ import annotations

import numpy as np

from pallas_kernels.chips import Chip
from pallas_kernels.grouped_product import ProductTiling
from pallas_kernels.row_blocks import PACK, BlockCost, best_sums


def cut(sizes_G: np.ndarray, block_rows: tuple[int, ...], cost: BlockCost) -> list[tuple[int, int]]:
    """Group and rows of each block; groups start with a pack."""
    sums, largest, blocks = best_sums(block_rows, cost), max(block_rows), []
    for group, rows in enumerate(sizes_G):
        packs = -(-int(rows) // PACK)
        whole = max(0, -(-(packs - len(sums) + 1) // (largest // PACK)))
        tail = [block_rows[i] for i in sums[packs - whole * largest // PACK] if i >= 0]
        blocks += [(group, size) for size in [largest] * whole + tail]
    return blocks


def seconds(
    chip: Chip, tiling: ProductTiling, blocks: list[tuple[int, int]], row_bytes: int, result_bytes: int, matrix_bytes: int
) -> float:
    """Of one panel on one core, whose result has `result_bytes` per row."""
    bandwidth, num_groups = chip.hbm / chip.cores, blocks[-1][0] + 1
    cycles = {rows: tiling.cost(rows) for rows in tiling.block_rows}
    row_seconds, result_seconds, matrix_seconds = row_bytes / bandwidth, result_bytes / bandwidth, matrix_bytes / bandwidth
    now = queue = 0.0
    rows_at, results_at, matrix_at = [], [0.0] * tiling.results, []
    for ahead in range(max(tiling.matrices, tiling.read_ahead + 1)):
        if ahead < min(tiling.read_ahead + 1, len(blocks)):
            queue += blocks[ahead][1] * row_seconds
            rows_at.append(queue)
        if ahead < min(tiling.matrices, num_groups):
            queue += matrix_seconds
            matrix_at.append(queue)
    for block, (group, rows) in enumerate(blocks):
        now = max(now, rows_at[block], matrix_at[group], results_at[block]) + cycles[rows] / chip.clock
        queue = max(queue, now)
        if block + tiling.read_ahead + 1 < len(blocks):
            queue += blocks[block + tiling.read_ahead + 1][1] * row_seconds
            rows_at.append(queue)
        queue += rows * result_seconds
        results_at.append(queue)
        if (block + 1 == len(blocks) or blocks[block + 1][0] != group) and group + tiling.matrices < num_groups:
            queue += matrix_seconds
            matrix_at.append(queue)
    return max(now, queue)
