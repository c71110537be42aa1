"""Rows times rows, summed over each group: the weight gradient of an expert layer.

For every group its rows are cut into blocks as long as fit, and its result into tiles of columns; a block's contribution to a tile is
one straight run of products. A group of one block, the usual case, keeps its left rows in memory for all tiles, so that every byte
moves once. Where more blocks are needed the tile is the outer loop: its sum stays in float32 and the rows are read again for each tile,
which costs nothing, since groups so large are bound by the matrix units. Rows of a block that are not of its group are set to zero
before the product; groups without rows are written as zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_blocks import PACK, BlockCost, cut_groups
from pallas_kernels.shapes import full_precision, varying_like

# Left features of a product within a run. Slices keep few results and transposed rows alive at a time, else they spill.
SLICE = 512


@dataclasses.dataclass(frozen=True)
class OuterTiling:
    """How a weight gradient is cut.

    Attributes:
      block_rows: sizes of blocks of rows, multiples of what the matrix units contract at once.
      columns: columns of a tile of the result.
      panels: parts of all columns, each a pass over the rows; a multiple of the cores.
      read_ahead: tiles whose rows are read ahead.
      results: buffers for finished tiles.
      adds_beside: rows of a block from which on adding to a sum hides behind the products; smaller blocks that are their group's
        only one have code that does without.
      cost: of a block of rows in a tile.
      vmem_limit: bytes of vector memory that the kernel may take.
    """

    block_rows: tuple[int, ...]
    columns: int
    panels: int
    read_ahead: int
    results: int
    adds_beside: int
    cost: BlockCost
    vmem_limit: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """One visit for every block of rows and tile of columns, in the order in which they are made; see FIELDS.

    Attributes:
      visits: int32 [len(FIELDS), V].
      count: int32 [1], visits in use.
    """

    visits: jax.Array
    count: jax.Array


# Of each visit: matrix and tile of the result, first row of the block (a multiple of PACK), index of its size (behind the last one:
# no rows) and that size, rows to read (a multiple of PACK), rows at the head that are of other groups, row behind the group's last
# one, which block of left rows it uses and whether it is the first to do so, which tile in the order of tiles, and whether its block
# is the first and the last of the tile.
GROUP, TILE, START, SIZE, ROWS, READ, HEAD, END, LEFT, READS_LEFT, RESULT, FIRST, LAST = FIELDS = range(13)


def plan_visits(group_sizes_G: jax.Array, num_rows: int, tiles: int, tiling: OuterTiling) -> Visits:
    cut = cut_groups(group_sizes_G, tiling.block_rows, tiling.cost)
    blocks_G = jnp.maximum(cut.blocks_G, 1)
    num_visits = cut.max_blocks(num_rows) * tiles
    last_G = jnp.cumsum(blocks_G * tiles)
    visit_V = jnp.arange(num_visits)
    group_V = jnp.minimum((visit_V[:, None] >= last_G).sum(1), group_sizes_G.size - 1)
    within_V = visit_V - (last_G - blocks_G * tiles)[group_V]
    blocks_V = blocks_G[group_V]
    tile_V, block_V = within_V // blocks_V, within_V % blocks_V
    start_V, size_V = cut.block(group_V, block_V)
    rows_V = jnp.asarray((*tiling.block_rows, 0))[size_V]
    end_V = jnp.minimum(cut.end_G[group_V] - start_V, rows_V)
    reads_V = (blocks_V > 1) | (tile_V == 0)
    is_first_V = block_V == 0
    fields = (
        group_V, tile_V, start_V, size_V, rows_V, -(-end_V // PACK) * PACK, jnp.maximum(cut.begin_G[group_V] - start_V, 0), end_V,
        jnp.cumsum(reads_V) - 1, reads_V, jnp.cumsum(is_first_V) - 1, is_first_V, block_V == blocks_V - 1,
    )  # fmt: skip
    return Visits(jnp.stack([field.astype(jnp.int32) for field in fields]), last_G[-1:].astype(jnp.int32))


def grouped_outer(
    lhs_MK: jax.Array,
    rhs_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: jnp.dtype,
    tiling: OuterTiling,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """For each group the product of its transposed left rows with its right rows, accumulated in float32, [G, K, N].

    Args:
      lhs_MK, rhs_MN: rows sorted by group, of the same dtype.
      group_sizes_G: int32; sums to M.
      dtype: of the result. Groups without rows give exact zeros.

    Raises:
      ValueError: the columns do not divide into the tiling's.
    """
    if padding := -lhs_MK.shape[0] % PACK:
        lhs_MK, rhs_MN = (jnp.pad(x, ((0, padding), (0, 0))) for x in (lhs_MK, rhs_MN))
    (num_rows, depth), num_columns = lhs_MK.shape, rhs_MN.shape[1]
    if num_columns % (tiling.panels * tiling.columns):
        raise ValueError(f"{num_columns} columns do not divide into {tiling.panels} panels of tiles of {tiling.columns} columns.")
    num_groups = group_sizes_G.size
    tiles = num_columns // tiling.panels // tiling.columns
    visits = plan_visits(group_sizes_G, num_rows, tiles, tiling)
    slots, block = tiling.read_ahead + 1, max(tiling.block_rows)
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, panel_columns=num_columns // tiling.panels),
        out_shape=varying_like((num_groups, depth, num_columns), dtype, lhs_MK, rhs_MN, visits.visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiling.panels,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((slots, block, depth), lhs_MK.dtype),
                pltpu.VMEM((slots, block, tiling.columns), rhs_MN.dtype),
                pltpu.VMEM((tiling.results, depth, tiling.columns), dtype),
                pltpu.VMEM((depth, tiling.columns), jnp.float32),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SemaphoreType.DMA((tiling.results,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiling.vmem_limit, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * num_columns,
            bytes_accessed=lhs_MK.nbytes * tiling.panels + rhs_MN.nbytes + num_groups * depth * num_columns * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_outer",
    )(visits.visits, visits.count, lhs_MK, rhs_MN)


def _kernel(  # type: ignore[no-untyped-def]
    visits, count, lhs, rhs, out, lhs_ring, rhs_ring, results, total, lhs_sems, rhs_sems, result_sems,
    *, tiling: OuterTiling, panel_columns: int,
):  # fmt: skip
    num_visits, slots = count[0], tiling.read_ahead + 1
    panel = pl.program_id(0) * panel_columns

    def columns(visit):  # type: ignore[no-untyped-def]
        return pl.ds(pl.multiple_of(panel + visits[TILE, visit] * tiling.columns, tiling.columns), tiling.columns)

    def lhs_copy(visit):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(visits[LEFT, visit], slots), pl.multiple_of(visits[READ, visit], PACK)
        start = pl.multiple_of(visits[START, visit], PACK)
        return pltpu.make_async_copy(lhs.at[pl.ds(start, rows)], lhs_ring.at[slot, pl.ds(0, rows)], lhs_sems.at[slot])

    def rhs_copy(visit):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(visit, slots), pl.multiple_of(visits[READ, visit], PACK)
        start = pl.multiple_of(visits[START, visit], PACK)
        return pltpu.make_async_copy(rhs.at[pl.ds(start, rows), columns(visit)], rhs_ring.at[slot, pl.ds(0, rows)], rhs_sems.at[slot])

    def result_copy(visit):  # type: ignore[no-untyped-def]
        slot = jax.lax.rem(visits[RESULT, visit], tiling.results)
        return pltpu.make_async_copy(results.at[slot], out.at[visits[GROUP, visit], :, columns(visit)], result_sems.at[slot])

    def start_reading(visit) -> None:  # type: ignore[no-untyped-def]
        @pl.when(visit < num_visits)
        def _() -> None:
            @pl.when((visits[READS_LEFT, visit] == 1) & (visits[READ, visit] > 0))
            def _() -> None:
                lhs_copy(visit).start()

            @pl.when(visits[READ, visit] > 0)
            def _() -> None:
                rhs_copy(visit).start()

    def clear_strangers(visit) -> None:  # type: ignore[no-untyped-def]
        """Sets left rows of the block that are not of its group to zero. What is no number in them, be it of another group or left from
        an earlier one, would pass the zeros on the other side."""
        rows = lhs_ring.at[jax.lax.rem(visits[LEFT, visit], slots)]
        head, end = visits[HEAD, visit], visits[END, visit]
        row = jax.lax.broadcasted_iota(jnp.int32, (PACK, rows.shape[1]), 0)

        @pl.when(head > 0)
        def _() -> None:
            rows[:PACK] = jnp.where(row >= head, rows[:PACK], 0)

        def clear(pack, carry: None) -> None:  # type: ignore[no-untyped-def]
            at = pl.ds(pl.multiple_of(pack * PACK, PACK), PACK)
            rows[at] = jnp.where(row < end - pack * PACK, rows[at], 0)

        jax.lax.fori_loop(end // PACK, visits[ROWS, visit] // PACK, clear, None)

    def step(visit, carry: None) -> None:  # type: ignore[no-untyped-def]
        start_reading(visit + tiling.read_ahead)

        @pl.when(visits[READ, visit] > 0)
        def _() -> None:
            @pl.when(visits[READS_LEFT, visit] == 1)
            def _() -> None:
                lhs_copy(visit).wait()
                clear_strangers(visit)

            rhs_copy(visit).wait()

        is_first, is_last = visits[FIRST, visit] == 1, visits[LAST, visit] == 1

        @pl.when(is_first & (visits[RESULT, visit] >= tiling.results))
        def _() -> None:
            result_copy(visit).wait()  # of the tile that had this buffer

        lhs_slot, rhs_slot = jax.lax.rem(visits[LEFT, visit], slots), jax.lax.rem(visit, slots)
        result = results.at[jax.lax.rem(visits[RESULT, visit], tiling.results)]
        size = visits[SIZE, visit]
        for index, rows in enumerate(tiling.block_rows):

            def products(rows: int = rows) -> Iterator[tuple[slice, jax.Array]]:
                """Products of slices of the left features. Right rows that are not of the group count as zeros."""
                row = jax.lax.broadcasted_iota(jnp.int32, (rows, tiling.columns), 0)
                right = jnp.where((row >= visits[HEAD, visit]) & (row < visits[END, visit]), rhs_ring[rhs_slot, :rows], 0)
                for at in range(0, lhs_ring.shape[-1], SLICE):
                    features = slice(at, min(at + SLICE, lhs_ring.shape[-1]))
                    yield (
                        features,
                        jax.lax.dot_general(
                            lhs_ring[lhs_slot, :rows, features],
                            right,
                            (((0,), (0,)), ((), ())),
                            precision=full_precision(lhs_ring.dtype),
                            preferred_element_type=jnp.float32,
                        ),
                    )

            is_alone = is_first & is_last & (rows < tiling.adds_beside)
            if rows < tiling.adds_beside:

                @pl.when((size == index) & is_alone)
                def alone(products=products) -> None:  # type: ignore[no-untyped-def]
                    for features, product in products():
                        result[features] = product.astype(result.dtype)

            @pl.when((size == index) & ~is_alone)
            def _(products=products) -> None:  # type: ignore[no-untyped-def]
                for features, product in products():
                    sum_so_far = jnp.where(is_first, 0.0, total[features]) + product
                    total[features] = sum_so_far
                    result[features] = sum_so_far.astype(result.dtype)

        @pl.when(size == len(tiling.block_rows))
        def _() -> None:
            result[...] = jnp.zeros_like(result)

        @pl.when(is_last)
        def _() -> None:
            result_copy(visit).start()

    for visit in range(tiling.read_ahead):
        start_reading(visit)
    jax.lax.fori_loop(0, num_visits, step, None)
    finished = visits[RESULT, num_visits - 1] + 1
    for slot in range(tiling.results):

        @pl.when(slot < finished)
        def _(slot: int = slot) -> None:
            pltpu.make_async_copy(results.at[slot], out.at[0, :, pl.ds(0, tiling.columns)], result_sems.at[slot]).wait()
