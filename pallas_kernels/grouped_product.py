"""Rows times the matrix of their group: the forward product of an expert layer and, with the matrices transposed, its input gradient.

One pass over the groups moves every byte once. The matrix of a group stays in vector memory, in chunks of its columns, while the
group's rows stream past it; a ring of chunks is filled ahead, so that copies run through small groups (bound by memory) and large ones
(bound by the matrix units) alike. A block of rows times all the chunks is one straight run of products, long enough that filling and
draining the matrix units hardly counts. Blocks start where a copy may start, not where a group does: the head of a block may belong to
the group before it, whose last rows wait in a buffer of one pack, so every row is written once.

The matrices may be those of a longer stack (many layers' experts), read in place; and on chips of two cores that share a kernel each
core takes half of the columns.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_blocks import GROUP, HEAD, PACK, READ, SIZE, START, WRITE, BlockCost, RowBlocks, cut_rows
from pallas_kernels.shapes import full_precision, varying_like


@dataclasses.dataclass(frozen=True)
class ProductTiling:
    """How a product is cut.

    Attributes:
      block_rows: sizes of blocks of rows, multiples of 16.
      columns: columns of a chunk of the matrix.
      panels: parts of all columns, each a pass over the rows; a multiple of the cores.
      chunks: chunks of the ring in vector memory; at least those of one panel.
      read_ahead: blocks of rows that are read ahead.
      results: buffers for blocks of the result.
      cost: of a block of rows in a panel.
      vmem_limit: bytes of vector memory that the kernel may take.
    """

    block_rows: tuple[int, ...]
    columns: int
    panels: int
    chunks: int
    read_ahead: int
    results: int
    cost: BlockCost
    vmem_limit: int

    def panel_chunks(self, num_columns: int) -> int:
        """Chunks of a panel.

        Raises:
          ValueError: the columns do not divide, or the ring does not hold a panel.
        """
        chunks, rest = divmod(num_columns, self.panels * self.columns)
        if rest or chunks > self.chunks:
            raise ValueError(
                f"{num_columns} columns are not {self.panels} panels of up to {self.chunks} chunks of {self.columns} columns each."
            )
        return chunks


def grouped_product(
    lhs_MK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    first_matrix: jax.Array,
    *,
    transposed: bool,
    dtype: jnp.dtype,
    tiling: ProductTiling,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Each row times the matrix of its group, accumulated in float32.

    Args:
      lhs_MK: rows sorted by group.
      rhs: a matrix [K, N] of each group, of the dtype of the rows; `transposed`: [N, K].
      group_sizes_G: int32; sums to M.
      first_matrix: int32 scalar, matrix of the first group.
      dtype: of the result [M, N].
    """
    num_rows = lhs_MK.shape[0]
    if padding := -num_rows % PACK:
        lhs_MK = jnp.pad(lhs_MK, ((0, padding), (0, 0)))
    blocks = cut_rows(group_sizes_G, lhs_MK.shape[0], tiling.block_rows, tiling.cost)
    blocks = dataclasses.replace(blocks, groups=blocks.groups + first_matrix)
    return _call(lhs_MK, rhs, blocks, transposed, dtype, tiling, interpret)[:num_rows]


def _call(lhs_MK: jax.Array, rhs: jax.Array, blocks: RowBlocks, transposed: bool, dtype, tiling: ProductTiling, interpret) -> jax.Array:  # type: ignore[no-untyped-def]
    num_rows, depth = lhs_MK.shape
    num_columns = rhs.shape[1 if transposed else 2]
    panel, block = num_columns // tiling.panels, max(tiling.block_rows)
    chunk = (tiling.columns, depth) if transposed else (depth, tiling.columns)
    rhs_bytes = rhs.shape[1] * rhs.shape[2] * blocks.groups.size * rhs.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, transposed=transposed, tiling=tiling, panel_chunks=tiling.panel_chunks(num_columns)),
        out_shape=varying_like((num_rows, num_columns), dtype, lhs_MK, rhs, blocks.blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiling.panels,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tiling.chunks, *chunk), rhs.dtype),
                pltpu.VMEM((tiling.read_ahead + 1, block, depth), lhs_MK.dtype),
                pltpu.VMEM((tiling.results, block, panel), dtype),
                pltpu.VMEM((PACK, panel), dtype),
                pltpu.SemaphoreType.DMA((tiling.chunks,)),
                pltpu.SemaphoreType.DMA((tiling.read_ahead + 1,)),
                pltpu.SemaphoreType.DMA((tiling.results,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiling.vmem_limit, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * num_columns,
            bytes_accessed=lhs_MK.nbytes * tiling.panels + rhs_bytes + num_rows * num_columns * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_product_transposed" if transposed else "grouped_product",
    )(blocks.blocks, blocks.counts, blocks.groups, lhs_MK, rhs)


def _kernel(  # type: ignore[no-untyped-def]
    blocks, counts, groups, lhs, rhs, out, ring, lhs_ring, out_ring, carried, ring_sems, lhs_sems, out_sems,
    *, transposed: bool, tiling: ProductTiling, panel_chunks: int,
):  # fmt: skip
    num_blocks, num_groups = counts[0], counts[1]
    first_column = pl.program_id(0) * (panel_chunks * tiling.columns)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def wrap(slot):  # type: ignore[no-untyped-def]
        return jnp.where(slot >= tiling.chunks, slot - tiling.chunks, slot)

    def chunk_copy(group, chunk: int, slot):  # type: ignore[no-untyped-def]
        columns = pl.ds(pl.multiple_of(first_column + chunk * tiling.columns, tiling.columns), tiling.columns)
        matrix = rhs.at[groups[group]]
        return pltpu.make_async_copy(matrix.at[columns] if transposed else matrix.at[:, columns], ring.at[slot], ring_sems.at[slot])

    def fill(chunks: range, group, first_slot) -> None:  # type: ignore[no-untyped-def]
        """Starts copies of some chunks, counted from chunk 0 of `group`, into the slots from `first_slot`."""
        for ahead in sorted({chunk // panel_chunks for chunk in chunks}):

            @pl.when(group + ahead < num_groups)
            def _(ahead: int = ahead) -> None:
                for i, chunk in enumerate(chunks):
                    if chunk // panel_chunks == ahead:
                        chunk_copy(group + ahead, chunk % panel_chunks, wrap(first_slot + i)).start()

    def rows_copy(block):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(block, tiling.read_ahead + 1), pl.multiple_of(blocks[READ, block], PACK)
        start = pl.multiple_of(blocks[START, block], PACK)
        return pltpu.make_async_copy(lhs.at[pl.ds(start, rows)], lhs_ring.at[slot, pl.ds(0, rows)], lhs_sems.at[slot])

    def result_copy(block):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(block, tiling.results), pl.multiple_of(blocks[WRITE, block], PACK)
        start = pl.multiple_of(blocks[START, block], PACK)
        columns = pl.ds(pl.multiple_of(first_column, tiling.columns), panel_chunks * tiling.columns)
        return pltpu.make_async_copy(out_ring.at[slot, pl.ds(0, rows)], out.at[pl.ds(start, rows), columns], out_sems.at[slot])

    def wait_for_result(block) -> None:  # type: ignore[no-untyped-def]
        @pl.when((block >= 0) & (blocks[WRITE, jnp.maximum(block, 0)] > 0))
        def _() -> None:
            result_copy(block).wait()

    def step(block, state):  # type: ignore[no-untyped-def]
        previous_group, previous_slot = state
        group = blocks[GROUP, block]
        is_new = group != previous_group
        slot = jnp.where(is_new, wrap(previous_slot + panel_chunks), previous_slot)

        @pl.when(block + tiling.read_ahead < num_blocks)
        def _() -> None:
            rows_copy(block + tiling.read_ahead).start()

        @pl.when(is_new)
        def _() -> None:
            # The previous group's slots are free again; they take the chunks that follow those already on their way.
            fill(range(tiling.chunks, tiling.chunks + panel_chunks), group - 1, previous_slot)
            for chunk in range(panel_chunks):
                chunk_copy(group, chunk, wrap(slot + chunk)).wait()

        rows_copy(block).wait()

        wait_for_result(block - tiling.results)

        lhs_slot, out_slot = jax.lax.rem(block, tiling.read_ahead + 1), jax.lax.rem(block, tiling.results)
        for index, rows in enumerate(tiling.block_rows):

            @pl.when(blocks[SIZE, block] == index)
            def _(rows: int = rows) -> None:
                for chunk in range(panel_chunks):
                    product = jax.lax.dot_general(
                        lhs_ring[lhs_slot, :rows],
                        ring[wrap(slot + chunk)],
                        contracted,
                        precision=full_precision(lhs_ring.dtype),
                        preferred_element_type=jnp.float32,
                    )
                    columns = slice(chunk * tiling.columns, (chunk + 1) * tiling.columns)
                    out_ring[out_slot, :rows, columns] = product.astype(out_ring.dtype)

        head = blocks[HEAD, block]

        @pl.when(head > 0)
        def _() -> None:
            belongs_before = jax.lax.broadcasted_iota(jnp.int32, carried.shape, 0) < head
            out_ring[out_slot, :PACK] = jnp.where(belongs_before, carried[...], out_ring[out_slot, :PACK])

        written = pl.multiple_of(blocks[WRITE, block], PACK)

        @pl.when(written < blocks[READ, block])
        def _() -> None:
            carried[...] = out_ring[out_slot, pl.ds(written, PACK)]

        @pl.when(written > 0)
        def _() -> None:
            result_copy(block).start()

        return group, slot

    # Rows first: the ring is long, and copies arrive in order.
    for block in range(tiling.read_ahead):

        @pl.when(block < num_blocks)
        def _(block: int = block) -> None:
            rows_copy(block).start()

    fill(range(tiling.chunks), 0, 0)
    jax.lax.fori_loop(0, num_blocks, step, (-1, tiling.chunks - panel_chunks))
    for last in range(tiling.results, 0, -1):
        wait_for_result(num_blocks - last)
