"""Rows times the matrix of their group: the forward product of an expert layer and, with the matrices transposed, its input gradient.

One pass over the groups moves every byte once. The matrix of a group stays in vector memory, in chunks of its columns, while the
group's rows stream past it; a ring of chunks is filled ahead, so that copies run through small groups (bound by memory) and large ones
(bound by the matrix units) alike. A block of rows times all the chunks is one straight run of products, long enough that filling and
draining the matrix units hardly counts. Blocks start where a copy may start, not where a group does: the head of a block may belong to
the group before it, whose last rows are taken from that block's result, so every row is written once.

`grouped_swiglu` is the same pass with gate and up projection side by side: a chunk holds columns of both, and `silu(gate) * up * weight`
is formed from their sums before anything leaves the chip.

The matrices may be those of a longer stack (many layers' experts), read in place; and on chips of two cores that share a kernel each
core takes half of the columns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_blocks import PACK, BlockCost, RowBlocks, cut_rows
from pallas_kernels.shapes import full_precision, varying_like


@dataclasses.dataclass(frozen=True)
class ProductTiling:
    """How a product is cut.

    Attributes:
      block_rows: sizes of blocks of rows, multiples of 16.
      columns: columns of a chunk of the matrix; a chunk is one copy and one product.
      panels: parts of all columns, each a pass over the rows; a multiple of the cores.
      matrices: panels of matrices in vector memory: that in use, and those that are read ahead.
      read_ahead: blocks of rows that are read ahead.
      results: buffers for blocks of the result, at least 2.
      cost: of a block of rows in a panel.
      vmem_limit: bytes of vector memory that the kernel may take.
    """

    block_rows: tuple[int, ...]
    columns: int
    panels: int
    matrices: int
    read_ahead: int
    results: int
    cost: BlockCost
    vmem_limit: int


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
    return _call(lhs_MK, rhs, None, group_sizes_G, first_matrix, transposed, dtype, tiling, interpret)


def grouped_swiglu(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    weights_M: jax.Array,
    group_sizes_G: jax.Array,
    first_matrix: jax.Array,
    *,
    dtype: jnp.dtype,
    tiling: ProductTiling,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`weight * silu(row @ gate) * (row @ up)`, where gate and up are the left and the right half of the matrix of the row's group.

    Args:
      lhs_MK: rows sorted by group.
      rhs_GKN: a matrix [K, 2 F] of each group, of the dtype of the rows.
      weights_M: of the rows, in any floating dtype; they enter in float32.
      group_sizes_G: int32; sums to M.
      first_matrix: int32 scalar, matrix of the first group.
      dtype: of the result [M, F].
    """
    return _call(lhs_MK, rhs_GKN, weights_M, group_sizes_G, first_matrix, False, dtype, tiling, interpret)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a step of the kernel would otherwise have to work out in scalars.

    Attributes:
      steps: int32 [16 P], see FIELDS.
      counts: int32 [2], blocks and groups in use.
      matrices: int32, those that are read before the first step, as far as there are groups for them.
    """

    steps: jax.Array
    counts: jax.Array
    matrices: jax.Array


# Of each block, in one line of words: index of its size; slots of its rows, of its result and of its matrix; rows to read; rows
# that the slot of its result held before, if they went to memory; whether its matrix is a new one; rows at its head that belong to
# earlier groups, and where in the slot of the block before it they are; first row, and rows to write; first row and rows of the block
# that is read into its slot after it (0 rows: none); matrix that is read into its matrix's slot after it, and rows of a chunk of it
# (0: none).
FIELDS = range(16)
SIZE, ROWS_SLOT, RESULT_SLOT, MATRIX_SLOT, READ, REUSED, NEW, HEAD = FIELDS[:8]
BEFORE_SLOT, BEFORE, START, WRITE, NEXT_START, NEXT_READ, NEXT_MATRIX, NEXT_CHUNK = FIELDS[8:]
_LINE = len(FIELDS)
_LANES = 128


def plan_steps(cut: RowBlocks, first_matrix: jax.Array, chunk_rows: int, tiling: ProductTiling) -> Plan:
    """The steps of a panel, one per block of rows; `chunk_rows` are those of a chunk of a matrix."""
    num_blocks, num_groups = cut.counts[0], cut.counts[1]
    block_P = jnp.arange(cut.blocks.shape[1])
    used_P = block_P < num_blocks
    start_P, size_P, group_P, read_P, write_P, head_P = jnp.where(used_P, cut.blocks, 0)

    def shifted(x_P: jax.Array, blocks: int, fill: int = 0) -> jax.Array:
        """Of the block that comes `blocks` later."""
        return jnp.where((block_P + blocks >= 0) & (block_P + blocks < num_blocks), jnp.roll(x_P, -blocks), fill)

    is_last_P = shifted(group_P, 1, -1) != group_P
    next_group_P = group_P + tiling.matrices
    reads_matrix_P = is_last_P & (next_group_P < num_groups)
    ahead = tiling.read_ahead + 1
    fields = (
        size_P,
        block_P % ahead,
        block_P % tiling.results,
        group_P % tiling.matrices,
        read_P,
        shifted(write_P, -tiling.results),
        shifted(group_P, -1, -1) != group_P,
        head_P,
        (block_P - 1) % tiling.results,
        jnp.where(head_P > 0, shifted(write_P, -1), 0),
        start_P,
        write_P,
        shifted(start_P, ahead),
        shifted(read_P, ahead),
        cut.groups[jnp.minimum(next_group_P, num_groups - 1)] + first_matrix,
        jnp.where(reads_matrix_P, chunk_rows, 0),
    )
    matrices = cut.groups[: tiling.matrices] + first_matrix
    return Plan(jnp.stack(fields, 1).astype(jnp.int32).reshape(-1), cut.counts, matrices.astype(jnp.int32))


def _call(  # type: ignore[no-untyped-def]
    lhs_MK, rhs, weights_M, group_sizes_G, first_matrix, transposed: bool, dtype, tiling: ProductTiling, interpret
) -> jax.Array:
    all_rows, depth = lhs_MK.shape
    gated = weights_M is not None
    num_columns = rhs.shape[1 if transposed else 2] // (2 if gated else 1)  # of the result
    width = tiling.columns // (2 if gated else 1)
    panel, rest = divmod(num_columns, tiling.panels)
    if rest or panel % width:
        raise ValueError(f"{num_columns} columns are not {tiling.panels} panels of whole chunks of {width} columns each.")
    operands = [jnp.pad(lhs_MK, ((0, -all_rows % PACK), (0, 0))), rhs]
    if gated:
        # As wide as a register, so that a row's weight needs no moving.
        weights_M = jnp.pad(weights_M.astype(jnp.float32), (0, -all_rows % PACK))
        operands.append(jnp.broadcast_to(weights_M[:, None], (weights_M.size, _LANES)))
    num_rows = operands[0].shape[0]
    cut = cut_rows(group_sizes_G, num_rows, tiling.block_rows, tiling.cost)
    plan = plan_steps(cut, first_matrix, tiling.columns if transposed else depth, tiling)
    block, chunk = max(tiling.block_rows), (tiling.columns, depth) if transposed else (depth, tiling.columns)
    out_MN = pl.pallas_call(
        functools.partial(_kernel, transposed=transposed, gated=gated, tiling=tiling),
        out_shape=varying_like((num_rows, num_columns), dtype, *operands, plan.steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiling.panels,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tiling.matrices, panel // width, *chunk), rhs.dtype),
                *(pltpu.VMEM((tiling.read_ahead + 1, block, x.shape[1]), x.dtype) for x in operands if x is not rhs),
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
            flops=2 * num_rows * depth * num_columns * (2 if gated else 1),
            bytes_accessed=lhs_MK.nbytes * tiling.panels + rhs.nbytes + num_rows * num_columns * jnp.dtype(dtype).itemsize,
            transcendentals=num_rows * num_columns if gated else 0,
        ),
        interpret=interpret,
        name="grouped_swiglu" if gated else "grouped_product_transposed" if transposed else "grouped_product",
    )(plan.steps, plan.counts, plan.matrices, *operands)
    return out_MN[:all_rows]


def _kernel(  # type: ignore[no-untyped-def]
    steps, counts, first_matrices, lhs, rhs, *refs, transposed: bool, gated: bool, tiling: ProductTiling
) -> None:
    rows_in, (out, ring) = (lhs, *refs[:gated]), refs[gated : gated + 2]
    row_rings, (out_ring, carried, ring_sems, row_sems, out_sems) = refs[gated + 2 : -5], refs[-5:]
    num_chunks, parts, panel = ring.shape[1], 2 if gated else 1, out_ring.shape[2]
    width = panel // num_chunks  # of the result of a chunk
    own_columns = pl.ds(pl.multiple_of(pl.program_id(0) * panel, panel), panel)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def field(step, name: int):  # type: ignore[no-untyped-def]
        return steps[step * _LINE + name]

    def read_matrix(matrix, rows, slot) -> None:  # type: ignore[no-untyped-def]
        rows = pl.multiple_of(rows, PACK)
        for chunk, part in itertools.product(range(num_chunks), range(parts)):
            first = pl.multiple_of(part * panel * tiling.panels + pl.program_id(0) * panel + chunk * width, width)
            source = rhs.at[matrix, pl.ds(first, rows)] if transposed else rhs.at[matrix, pl.ds(0, rows), pl.ds(first, width)]
            target = ring.at[slot, chunk, pl.ds(0, rows), pl.ds(part * width, width) if gated else slice(None)]
            pltpu.make_async_copy(source, target, ring_sems.at[slot]).start()

    def wait_for_matrix(slot) -> None:  # type: ignore[no-untyped-def]
        pltpu.make_async_copy(ring.at[slot], ring.at[slot], ring_sems.at[slot]).wait()  # as many bytes as all chunks have

    def rows_copies(start, rows, slot):  # type: ignore[no-untyped-def]
        start, rows = pl.multiple_of(start, PACK), pl.multiple_of(rows, PACK)
        for source, target in zip(rows_in, row_rings, strict=True):
            yield pltpu.make_async_copy(source.at[pl.ds(start, rows)], target.at[slot, pl.ds(0, rows)], row_sems.at[slot])

    def result_copy(start, rows, slot):  # type: ignore[no-untyped-def]
        start, rows = pl.multiple_of(start, PACK), pl.multiple_of(rows, PACK)
        return pltpu.make_async_copy(out_ring.at[slot, pl.ds(0, rows)], out.at[pl.ds(start, rows), own_columns], out_sems.at[slot])

    def chunk_result(of, rows: int, chunk: int):  # type: ignore[no-untyped-def]
        product = jax.lax.dot_general(
            row_rings[0][of[ROWS_SLOT], :rows],
            ring[of[MATRIX_SLOT], chunk],
            contracted,
            precision=full_precision(lhs.dtype),
            preferred_element_type=jnp.float32,
        )
        if not gated:
            return product
        weight = jnp.concatenate([row_rings[1][of[ROWS_SLOT], :rows]] * (width // _LANES), 1)
        return jax.nn.silu(product[:, :width]) * product[:, width:] * weight

    def run(of, rows: int) -> None:  # type: ignore[no-untyped-def]
        """A block of `rows` rows times its matrix, and the copies for which it makes room. All without a branch, so that what is no
        product is done while the matrix units fill and drain; a copy of no rows is none."""
        carried[...] = out_ring[of[BEFORE_SLOT], pl.ds(pl.multiple_of(of[BEFORE], PACK), PACK)]
        belongs_before = jax.lax.broadcasted_iota(jnp.int32, (PACK, width), 0) < of[HEAD]
        for chunk in range(num_chunks):
            columns, result = slice(chunk * width, (chunk + 1) * width), chunk_result(of, rows, chunk)
            first_pack = jnp.where(belongs_before, carried[:, columns].astype(jnp.float32), result[:PACK])
            out_ring[of[RESULT_SLOT], :PACK, columns] = first_pack.astype(out_ring.dtype)
            if rows > PACK:
                out_ring[of[RESULT_SLOT], PACK:rows, columns] = result[PACK:].astype(out_ring.dtype)
        for copy in rows_copies(of[NEXT_START], of[NEXT_READ], of[ROWS_SLOT]):
            copy.start()
        result_copy(of[START], of[WRITE], of[RESULT_SLOT]).start()
        read_matrix(of[NEXT_MATRIX], of[NEXT_CHUNK], of[MATRIX_SLOT])

    def wait_for_result(rows, slot) -> None:  # type: ignore[no-untyped-def]
        @pl.when(rows > 0)
        def _() -> None:
            result_copy(0, rows, slot).wait()

    def body(step, carry):  # type: ignore[no-untyped-def]
        of = [field(step, name) for name in FIELDS]  # all at once: a load from scalar memory takes several cycles

        @pl.when(of[NEW] > 0)
        def _() -> None:
            wait_for_matrix(of[MATRIX_SLOT])

        for copy in rows_copies(0, of[READ], of[ROWS_SLOT]):
            copy.wait()
        wait_for_result(of[REUSED], of[RESULT_SLOT])
        choose(of, 0, len(tiling.block_rows))
        return carry

    def choose(of, first: int, last: int) -> None:  # type: ignore[no-untyped-def]
        """The run for one of the sizes [first, last), by halves: every condition takes a while."""
        if last - first == 1:
            return run(of, tiling.block_rows[first])
        middle = (first + last) // 2
        pl.when(of[SIZE] < middle)(lambda: choose(of, first, middle))
        pl.when(of[SIZE] >= middle)(lambda: choose(of, middle, last))

    # What is needed first comes first.
    for ahead in range(max(tiling.matrices, tiling.read_ahead + 1)):
        if ahead < min(tiling.read_ahead + 1, steps.shape[0] // _LINE):
            for copy in rows_copies(field(ahead, START), field(ahead, READ), ahead):
                copy.start()
        if ahead < first_matrices.shape[0]:
            read_matrix(first_matrices[ahead], jnp.where(ahead < counts[1], ring.shape[2], 0), ahead)
    jax.lax.fori_loop(0, counts[0], body, 0)
    for last in range(min(tiling.results, steps.shape[0] // _LINE), 0, -1):
        step = jnp.maximum(counts[0] - last, 0)
        wait_for_result(jnp.where(counts[0] >= last, field(step, WRITE), 0), field(step, RESULT_SLOT))
