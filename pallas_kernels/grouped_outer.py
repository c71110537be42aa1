"""Rows times rows, summed over each group: the weight gradient of an expert layer.

For every group its rows are cut into blocks as long as fit, and its result into tiles of columns; a block's contribution to a tile is
one straight run of products. A group of one block, the usual case, keeps its left rows in memory for all tiles, so that every byte
moves once. Where more blocks are needed the tile is the outer loop: its sum stays in float32 and the rows are read again for each tile,
which costs nothing, since groups so large are bound by the matrix units.

The matrix units contract `unit` rows at once, so a group costs whole multiples of that; it never costs one more because it starts
within a pack of rows: where the last pack's rows would be too many, they take the places of the first pack's rows of other groups.
All other rows that are not of the group count as zeros on both sides, so that not even what is no number crosses over; and a group
without rows is a block of none, whose products are the zeros that it needs.

Whatever a visit needs to know is computed ahead, and copies are started at the end of a run: between two runs there are waits only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_blocks import PACK
from pallas_kernels.shapes import full_precision, varying_like

# Left features of a product within a run. Slices keep few results and transposed rows alive at a time, else they spill.
SLICE = 512


@dataclasses.dataclass(frozen=True)
class OuterTiling:
    """How a weight gradient is cut.

    Attributes:
      unit: rows that the matrix units contract at once, a multiple of PACK.
      units: the most of them in a block of rows; there is code for any number up to this.
      columns: columns of a tile of the result.
      panels: parts of all columns, each a pass over the rows; a multiple of the cores.
      slots: buffers for rows of visits; one is in use, the others are read ahead.
      results: buffers for finished tiles.
      adds_beside: units of a block from which on adding to a sum hides behind the products; smaller blocks that are their group's only
        one have code that does without.
      vmem_limit: bytes of vector memory that the kernel may take.
    """

    unit: int
    units: int
    columns: int
    panels: int
    slots: int
    results: int
    adds_beside: int
    vmem_limit: int

    @property
    def block_rows(self) -> int:
        return self.unit * self.units

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that there is code for: of a block that others follow, then of last blocks, then of blocks without others."""
        last = (Run(units, True, True) for units in range(1, self.units + 1))
        alone = (Run(units, False, True) for units in range(1, min(self.units + 1, self.adds_beside)))
        return (Run(self.units, True, False), *last, *alone)


class Run(NamedTuple):
    """A block's contribution to a tile: units of rows, whether it adds to the sum of blocks before, whether it gives the result."""

    units: int
    adds: bool
    gives: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """One visit for every block of rows and tile of columns, in the order in which they are made; see FIELDS.

    Attributes:
      visits: int32 [len(FIELDS), V].
      count: int32 [1], visits in use. As many as there are buffers follow that read nothing.
    """

    visits: jax.Array
    count: jax.Array


# Of each visit: matrix and first column of the tile in the panel, first row of the block (a multiple of PACK), rows to read (likewise;
# more than those of the run if the last pack goes into the first), rows at the head that are of other groups, row behind the group's
# last one, which of the runs, and whether its block is the group's first; buffers of left rows, right rows and the result; whether it
# reads left rows or finds them, and whether its result's buffer was in use before.
GROUP, COLUMN, START, READ, HEAD, END, RUN, FIRST, LEFT, RIGHT, RESULT, READS_LEFT, REUSES = FIELDS = range(13)


def plan_visits(group_sizes_G: jax.Array, num_rows: int, tiles: int, tiling: OuterTiling) -> Visits:
    """The visits of one panel. `num_rows` is a multiple of PACK; the groups' rows may fall short of it by less than that."""
    num_groups = group_sizes_G.size
    end_G = jnp.cumsum(group_sizes_G)
    start_G = jnp.minimum((end_G - group_sizes_G) // PACK * PACK, num_rows - PACK)
    head_G = jnp.where(group_sizes_G > 0, end_G - group_sizes_G - start_G, 0)
    rows_G = jnp.where(group_sizes_G > 0, end_G - start_G, 0)
    # Rows in the last pack go into the first one if there are as many places; the group is as many rows shorter.
    tail_G = (rows_G - 1) % PACK + 1
    folded_G = rows_G - jnp.where((tail_G <= head_G) & (rows_G > PACK), tail_G, 0)
    blocks_G = jnp.where(folded_G <= tiling.block_rows, 1, -(-rows_G // tiling.block_rows))

    last_G = jnp.cumsum(blocks_G * tiles)
    max_visits = ((num_rows + 2 * PACK * num_groups) // tiling.block_rows + num_groups) * tiles
    visit_V = jnp.arange(max_visits + tiling.slots)
    is_used_V = visit_V < last_G[-1]
    group_V = jnp.minimum((visit_V[:, None] >= last_G).sum(1), num_groups - 1)
    within_V, blocks_V = visit_V - (last_G - blocks_G * tiles)[group_V], blocks_G[group_V]
    tile_V, block_V = within_V // blocks_V, within_V % blocks_V
    is_first_V, is_last_V, is_alone_V = block_V == 0, block_V == blocks_V - 1, blocks_V == 1

    skipped_V = block_V * tiling.block_rows
    end_V = jnp.minimum(rows_G[group_V] - skipped_V, jnp.where(is_last_V, num_rows, tiling.block_rows))
    units_V = jnp.maximum(-(-jnp.where(is_alone_V, folded_G[group_V], end_V) // tiling.unit), 1)
    run_V = jnp.where(is_last_V, units_V + jnp.where(is_alone_V & (units_V < tiling.adds_beside), tiling.units, 0), 0)
    reads_left_V = (~is_alone_V | (tile_V == 0)) & is_used_V
    result_V = jnp.cumsum(is_last_V) - 1
    fields = (
        group_V, tile_V * tiling.columns, start_G[group_V] + skipped_V, jnp.where(is_used_V, jnp.maximum(-(-end_V // PACK), 1) * PACK, 0),
        jnp.where(is_first_V, head_G[group_V], 0), end_V, run_V, is_first_V,
        (jnp.cumsum(reads_left_V) - 1) % tiling.slots, visit_V % tiling.slots, result_V % tiling.results,
        reads_left_V, is_last_V & (result_V >= tiling.results),
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
    panel = num_columns // tiling.panels
    tiles = panel // tiling.columns
    visits = plan_visits(group_sizes_G, num_rows, tiles, tiling)
    block = tiling.block_rows + PACK
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, panel=panel, num_results=num_groups * tiles),
        out_shape=varying_like((num_groups, depth, num_columns), dtype, lhs_MK, rhs_MN, visits.visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiling.panels,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tiling.slots, block, depth), lhs_MK.dtype),
                pltpu.VMEM((tiling.slots, block, tiling.columns), rhs_MN.dtype),
                pltpu.VMEM((tiling.results, depth, tiling.columns), dtype),
                pltpu.VMEM((depth, tiling.columns), jnp.float32),
                pltpu.SemaphoreType.DMA((tiling.slots,)),
                pltpu.SemaphoreType.DMA((tiling.slots,)),
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
    *, tiling: OuterTiling, panel: int, num_results: int,
):  # fmt: skip
    first_column = pl.program_id(0) * panel

    def columns(visit):  # type: ignore[no-untyped-def]
        return pl.ds(pl.multiple_of(first_column + visits[COLUMN, visit], tiling.columns), tiling.columns)

    def rows(visit):  # type: ignore[no-untyped-def]
        size = pl.multiple_of(visits[READ, visit], PACK)
        return pl.ds(pl.multiple_of(visits[START, visit], PACK), size), pl.ds(0, size)

    def lhs_copy(visit):  # type: ignore[no-untyped-def]
        slot, (there, here) = visits[LEFT, visit], rows(visit)
        return pltpu.make_async_copy(lhs.at[there], lhs_ring.at[slot, here], lhs_sems.at[slot])

    def rhs_copy(visit):  # type: ignore[no-untyped-def]
        slot, (there, here) = visits[RIGHT, visit], rows(visit)
        return pltpu.make_async_copy(rhs.at[there, columns(visit)], rhs_ring.at[slot, here], rhs_sems.at[slot])

    def result_copy(visit):  # type: ignore[no-untyped-def]
        slot = visits[RESULT, visit]
        return pltpu.make_async_copy(results.at[slot], out.at[visits[GROUP, visit], :, columns(visit)], result_sems.at[slot])

    def start_reading(visit) -> None:  # type: ignore[no-untyped-def]
        @pl.when(visits[READS_LEFT, visit] == 1)
        def _() -> None:
            lhs_copy(visit).start()

        @pl.when(visits[READ, visit] > 0)
        def _() -> None:
            rhs_copy(visit).start()

    def own_rows(ring, head, end, count: int, features: slice) -> jax.Array:  # type: ignore[no-untyped-def]
        """The group's rows among the first `count`; in other rows' places zeros, or rows of the pack behind."""

        def between(first, last, x: jax.Array, other: jax.Array | int) -> jax.Array:  # type: ignore[no-untyped-def]
            row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            return jnp.where((row >= first) & (row < last), x, other)

        behind = between(0, end - count, ring[count : count + PACK, features], 0)
        first = between(head, end, ring[:PACK, features], behind)
        return jnp.concatenate([first, between(0, end - PACK, ring[PACK:count, features], 0)]) if count > PACK else first

    def run(visit, block: Run) -> None:  # type: ignore[no-untyped-def]
        left, right = lhs_ring.at[visits[LEFT, visit]], rhs_ring.at[visits[RIGHT, visit]]
        own = functools.partial(own_rows, head=visits[HEAD, visit], end=visits[END, visit], count=block.units * tiling.unit)
        is_first, result = visits[FIRST, visit] == 1, results.at[visits[RESULT, visit]]
        right_rows = own(right, features=slice(None))
        for at in range(0, left.shape[-1], SLICE):
            features = slice(at, min(at + SLICE, left.shape[-1]))
            product = jax.lax.dot_general(
                own(left, features=features),
                right_rows,
                (((0,), (0,)), ((), ())),
                precision=full_precision(left.dtype),
                preferred_element_type=jnp.float32,
            )
            if block.adds:
                product += jnp.where(is_first, 0.0, total[features])
            if block.gives:
                result[features] = product.astype(result.dtype)
            else:
                total[features] = product
        if block.gives:
            result_copy(visit).start()
        start_reading(visit + tiling.slots)  # into the buffers that are free now

    def step(visit, carry: None) -> None:  # type: ignore[no-untyped-def]
        @pl.when(visits[READS_LEFT, visit] == 1)
        def _() -> None:
            lhs_copy(visit).wait()

        rhs_copy(visit).wait()

        @pl.when(visits[REUSES, visit] == 1)
        def _() -> None:
            result_copy(visit).wait()  # of the tile that had this buffer

        choose(visit, 0, len(tiling.runs))

    def choose(visit, first: int, last: int) -> None:  # type: ignore[no-untyped-def]
        """One of the runs [first, last), by halves: every condition takes a while."""
        if last - first == 1:
            return run(visit, tiling.runs[first])
        middle = (first + last) // 2
        pl.when(visits[RUN, visit] < middle)(lambda: choose(visit, first, middle))
        pl.when(visits[RUN, visit] >= middle)(lambda: choose(visit, middle, last))

    for visit in range(tiling.slots):
        start_reading(visit)
    jax.lax.fori_loop(0, count[0], step, None)
    for slot in range(min(tiling.results, num_results)):
        pltpu.make_async_copy(results.at[slot], out.at[0, :, pl.ds(0, tiling.columns)], result_sems.at[slot]).wait()
