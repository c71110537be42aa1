"""Quantised rows times the quantised matrix of their group; both are e4m3 with one scale per block of 128.

The kernel moves one byte per element and multiplies in bfloat16: e4m3 times a power of two is exact there, so products are those of
the quantised numbers, summed in float32. Values become bfloat16 in the very run of products that uses them; the vector units, which
otherwise idle, do it while the matrix units work, and nothing is kept but the rows of a block. Where the matrix units take e4m3
themselves they are not used so: sums would have to be scaled for every 128 elements of the contraction, and that work of the vector
units alone takes as long as the whole product in bfloat16.

Otherwise as `grouped_product`: the matrix of a group stays in vector memory while the group's rows stream past it, matrices of the
next groups are on their way, and blocks of rows start where a copy may start, which for elements of a byte is every 32 rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_blocks import GROUP, HEAD, READ, SIZE, START, WRITE, BlockCost, RowBlocks, cut_rows
from pallas_kernels.shapes import varying_like

PACK = 32  # rows of a tile of bytes in memory: where a copy may start
BLOCK = 128  # elements along each side of a matrix, and along a row, that share a scale


@dataclasses.dataclass(frozen=True)
class ScaledTiling:
    """How a product is cut.

    Attributes:
      block_rows: sizes of blocks of rows, multiples of 32.
      columns: columns of the result that are multiplied at a time.
      panels: parts of all columns, each a pass over the rows; a multiple of the cores.
      matrices: of as many groups there is vector memory, at least two.
      read_ahead: blocks of rows that are read ahead.
      results: buffers for blocks of the result.
      native_e4m3: whether the vector units convert e4m3; else they know it with the exponent's bias 11 in place of 7.
      vectors: dtype in which the vector units scale.
      cost: of a block of rows in a panel.
      vmem_limit: bytes of vector memory that the kernel may take.
    """

    block_rows: tuple[int, ...]
    columns: int
    panels: int
    matrices: int
    read_ahead: int
    results: int
    native_e4m3: bool
    vectors: jnp.dtype
    cost: BlockCost
    vmem_limit: int


def scaled_product(
    lhs_MK: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes_G: jax.Array,
    first_matrix: jax.Array,
    *,
    transposed: bool,
    dtype: jnp.dtype,
    tiling: ScaledTiling,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Each row times the matrix of its group, of the numbers that values and scales stand for; accumulated in float32.

    Args:
      lhs_MK: rows sorted by group, e4m3.
      lhs_scale: [M, K / 128], float32.
      rhs: a matrix [K, N] of each group, e4m3; `transposed`: [N, K].
      rhs_scale: of its blocks of 128 x 128, float32.
      group_sizes_G: int32; sums to M.
      first_matrix: int32 scalar, matrix of the first group.
      dtype: of the result [M, N].

    Raises:
      ValueError: the columns do not divide into the tiling's.
    """
    num_rows, num_columns = lhs_MK.shape[0], rhs.shape[1 if transposed else 2]
    if num_columns % (tiling.panels * tiling.columns):
        raise ValueError(f"{num_columns} columns are not {tiling.panels} panels of multiples of {tiling.columns} columns.")
    if padding := -num_rows % PACK:
        lhs_MK, lhs_scale = (jnp.pad(x, ((0, padding), (0, 0))) for x in (lhs_MK, lhs_scale))
    blocks = cut_rows(group_sizes_G, lhs_MK.shape[0], tiling.block_rows, tiling.cost, PACK)
    scales = jax.lax.dynamic_slice_in_dim(rhs_scale, first_matrix, group_sizes_G.size)
    scales = _by_panel(scales, tiling.panels, transposed)
    return _call(lhs_MK, lhs_scale, rhs, scales, blocks, first_matrix.reshape(1), transposed, dtype, tiling, interpret)[:num_rows]


def _by_panel(rhs_scale: jax.Array, panels: int, transposed: bool) -> jax.Array:
    """Scales of each matrix and panel, row by row, in lines of 128: [matrices, panels, lines, 128]."""
    matrices, rows, columns = rhs_scale.shape
    if not transposed:
        rhs_scale = rhs_scale.reshape(matrices, rows, panels, columns // panels).swapaxes(1, 2)
    scales = rhs_scale.reshape(matrices, panels, -1)
    return jnp.pad(scales, ((0, 0), (0, 0), (0, -scales.shape[2] % 128))).reshape(matrices, panels, -1, 128)


def _call(  # type: ignore[no-untyped-def]
    lhs_MK, lhs_scale, rhs, scales, blocks: RowBlocks, first_matrix, transposed: bool, dtype, tiling: ScaledTiling, interpret
) -> jax.Array:
    num_rows, depth = lhs_MK.shape
    num_columns = rhs.shape[1 if transposed else 2]
    panel, block = num_columns // tiling.panels, max(tiling.block_rows)
    matrix = (panel, depth) if transposed else (depth, panel)
    read = lhs_MK.nbytes + lhs_scale.nbytes
    return pl.pallas_call(
        functools.partial(_kernel, transposed=transposed, tiling=tiling, panel=panel),
        out_shape=varying_like((num_rows, num_columns), dtype, lhs_MK, rhs, blocks.blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tiling.panels,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tiling.matrices, *matrix), rhs.dtype),
                pltpu.SMEM((tiling.matrices, *scales.shape[2:]), scales.dtype),
                pltpu.VMEM((tiling.read_ahead + 1, block, depth), lhs_MK.dtype),
                pltpu.VMEM((tiling.read_ahead + 1, block, lhs_scale.shape[1]), lhs_scale.dtype),
                pltpu.VMEM((block, depth), jnp.bfloat16),
                pltpu.VMEM((tiling.results, block, panel), dtype),
                pltpu.VMEM((PACK, panel), dtype),
                pltpu.SemaphoreType.DMA((tiling.matrices,)),
                pltpu.SemaphoreType.DMA((tiling.read_ahead + 1,)),
                pltpu.SemaphoreType.DMA((tiling.results,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiling.vmem_limit, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * num_columns,
            bytes_accessed=read * tiling.panels
            + depth * num_columns * blocks.groups.size
            + num_rows * num_columns * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="scaled_product_transposed" if transposed else "scaled_product",
    )(blocks.blocks, blocks.counts, blocks.groups, first_matrix, lhs_MK, lhs_scale, rhs, scales)


def _kernel(  # type: ignore[no-untyped-def]
    blocks, counts, groups, first_matrix, lhs, lhs_scale, rhs, rhs_scale, out,
    ring, ring_scales, lhs_ring, lhs_scales, rows_in_bf16, out_ring, carried, ring_sems, lhs_sems, out_sems,
    *, transposed: bool, tiling: ScaledTiling, panel: int,
):  # fmt: skip
    num_blocks, num_groups = counts[0], counts[1]
    depth = lhs.shape[1]
    first_column = pl.program_id(0) * panel
    # The transpose unit turns bytes faster than it turns bfloat16 on its way into the matrix units, if e4m3 is all that it is about.
    turned = transposed and tiling.native_e4m3
    dimensions = (((1,), (1 if transposed and not turned else 0,)), ((), ()))

    def matrix_copies(group):  # type: ignore[no-untyped-def]
        slot, matrix = jax.lax.rem(group, tiling.matrices), first_matrix[0] + groups[group]
        columns = pl.ds(pl.multiple_of(first_column, tiling.columns), panel)
        source = rhs.at[matrix, columns] if transposed else rhs.at[matrix, :, columns]
        return (
            pltpu.make_async_copy(source, ring.at[slot], ring_sems.at[slot]),
            pltpu.make_async_copy(rhs_scale.at[groups[group], pl.program_id(0)], ring_scales.at[slot], ring_sems.at[slot]),
        )

    def rows_copies(block):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(block, tiling.read_ahead + 1), pl.multiple_of(blocks[READ, block], PACK)
        source = pl.ds(pl.multiple_of(blocks[START, block], PACK), rows)
        return tuple(
            pltpu.make_async_copy(x.at[source], ring_of_x.at[slot, pl.ds(0, rows)], lhs_sems.at[slot])
            for x, ring_of_x in ((lhs, lhs_ring), (lhs_scale, lhs_scales))
        )

    def result_copy(block):  # type: ignore[no-untyped-def]
        slot, rows = jax.lax.rem(block, tiling.results), pl.multiple_of(blocks[WRITE, block], PACK)
        start = pl.multiple_of(blocks[START, block], PACK)
        columns = pl.ds(pl.multiple_of(first_column, tiling.columns), panel)
        return pltpu.make_async_copy(out_ring.at[slot, pl.ds(0, rows)], out.at[pl.ds(start, rows), columns], out_sems.at[slot])

    def start(copies_of, index, count) -> None:  # type: ignore[no-untyped-def]
        @pl.when(index < count)
        def _() -> None:
            for copy in copies_of(index):
                copy.start()

    def wait_for_result(block) -> None:  # type: ignore[no-untyped-def]
        @pl.when((block >= 0) & (blocks[WRITE, jnp.maximum(block, 0)] > 0))
        def _() -> None:
            result_copy(block).wait()

    def dequantize(values, scale):  # type: ignore[no-untyped-def]
        """Exactly, as bfloat16; `scale` is a scalar, or broadcasts to the values' shape."""
        if tiling.native_e4m3:
            return (values.astype(tiling.vectors) * scale.astype(tiling.vectors)).astype(jnp.bfloat16)
        bits = pltpu.bitcast(values, jnp.int8)
        bits = jnp.where(bits == -128, jnp.int8(0), bits)  # what is -0 with bias 7 is no number with bias 11
        values = pltpu.bitcast(bits, jnp.float8_e4m3b11fnuz)
        return (values.astype(tiling.vectors) * (scale * 16).astype(tiling.vectors)).astype(jnp.bfloat16)

    def dequantized_rows(slot, rows: int) -> None:  # type: ignore[no-untyped-def]
        for k in range(0, depth, BLOCK):
            scale = lhs_scales[slot, :rows, k // BLOCK : k // BLOCK + 1]
            rows_in_bf16[:rows, k : k + BLOCK] = dequantize(lhs_ring[slot, :rows, k : k + BLOCK], scale)

    def dequantized_matrix(slot, column: int):  # type: ignore[no-untyped-def]
        """Of some columns of the result all that is multiplied."""

        def block(row: int, column: int):  # type: ignore[no-untyped-def]
            index = (row * ring.shape[2] // BLOCK + column) // BLOCK
            values = ring[slot, row : row + BLOCK, column : column + BLOCK]
            return dequantize(values.T if turned else values, ring_scales[slot, index // 128, index % 128])

        columns, contracted = range(column, column + tiling.columns, BLOCK), range(0, depth, BLOCK)
        if turned:
            rows = [[block(c, k) for c in columns] for k in contracted]
        elif transposed:
            rows = [[block(c, k) for k in contracted] for c in columns]
        else:
            rows = [[block(k, c) for c in columns] for k in contracted]
        return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows], axis=0)

    def step(block, previous_group):  # type: ignore[no-untyped-def]
        group = blocks[GROUP, block]
        slot, lhs_slot, out_slot = (
            jax.lax.rem(i, n) for i, n in ((group, tiling.matrices), (block, tiling.read_ahead + 1), (block, tiling.results))
        )
        start(rows_copies, block + tiling.read_ahead, num_blocks)

        @pl.when(group != previous_group)
        def _() -> None:
            @pl.when(group > 0)
            def _() -> None:
                start(matrix_copies, group - 1 + tiling.matrices, num_groups)

            for copy in matrix_copies(group):
                copy.wait()

        for copy in rows_copies(block):
            copy.wait()

        wait_for_result(block - tiling.results)

        for index, rows in enumerate(tiling.block_rows):

            @pl.when(blocks[SIZE, block] == index)
            def _(rows: int = rows) -> None:
                dequantized_rows(lhs_slot, rows)
                for column in range(0, panel, tiling.columns):
                    product = jax.lax.dot_general(
                        rows_in_bf16[:rows], dequantized_matrix(slot, column), dimensions, preferred_element_type=jnp.float32
                    )
                    out_ring[out_slot, :rows, column : column + tiling.columns] = product.astype(out_ring.dtype)

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

        return group

    # Rows first: matrices are long, and copies arrive in order.
    for block in range(tiling.read_ahead):
        start(rows_copies, block, num_blocks)
    for group in range(tiling.matrices):
        start(matrix_copies, group, num_groups)
    jax.lax.fori_loop(0, num_blocks, step, -1)
    for last in range(tiling.results, 0, -1):
        wait_for_result(num_blocks - last)
