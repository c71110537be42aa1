"""How the rows of each group are cut into blocks of the few sizes for which a kernel has code.

A matrix unit that holds a weight tile streams rows through it, in packs of 16; a block of rows is one straight run of products, whose
code is unrolled, so a kernel has it for a handful of sizes only. Since every total is a sum of a few sizes, well-chosen ones waste
almost nothing; the best sum for each total is found once, while tracing, by dynamic programming.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

PACK = 16  # rows of a tile of bfloat16 in memory: where a copy may start; the pack that blocks start at unless another is given


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Modelled cycles of one block of rows.

    Attributes:
      per_row: to stream a row past the stationary matrices.
      min_rows: a block of fewer rows costs as much, since loading a stationary matrix takes as long as streaming these.
      overhead: to fill and drain the matrix units, and for what a step does besides.
      load, load_per_row: lower bound by making the stationary matrices ready.
    """

    per_row: float
    min_rows: int
    overhead: float
    load: float = 0.0
    load_per_row: float = 0.0

    def __call__(self, rows: int) -> float:
        return self.overhead + max(self.per_row * max(rows, self.min_rows), self.load + self.load_per_row * rows)


@functools.cache
def best_sums(sizes: tuple[int, ...], cost: BlockCost, pack: int = PACK) -> np.ndarray:
    """Cheapest block sizes whose sum covers 0, 1, 2, ... packs of rows, as indices into `sizes`; -1 where a sum has ended.

    Totals go up to the largest of which the best sum must be looked up: any rows beyond are cut off in blocks of the largest size.
    Shape [totals, blocks].
    """
    packs = 3 * max(sizes) // pack
    total_cost, first = [0.0], [-1]
    for total in range(1, packs + 1):
        options = [cost(size) + total_cost[max(0, total - size // pack)] for size in sizes]
        best = int(np.argmin(options))
        total_cost.append(options[best])
        first.append(best)
    sums = []
    for total in range(packs + 1):
        chosen = []
        while total > 0:
            chosen.append(first[total])
            total -= sizes[first[total]] // pack
        sums.append(sorted(chosen, key=lambda index: -sizes[index]))
    width = max(map(len, sums))
    return np.array([chosen + [-1] * (width - len(chosen)) for chosen in sums], np.int32)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the rows of every group are cut; arrays of int32 over the groups.

    Attributes:
      sizes: rows of a block for which there is code.
      pack: blocks start at multiples of as many rows.
      begin_G, end_G: rows of the group.
      blocks_G: number of blocks; 0 for a group without rows.
      whole_G: how many blocks of the largest size come first.
      tail_GB: sizes of the blocks that follow, as indices into `sizes`; -1 where there is none.
    """

    sizes: tuple[int, ...]
    pack: int
    begin_G: jax.Array
    end_G: jax.Array
    blocks_G: jax.Array
    whole_G: jax.Array
    tail_GB: jax.Array

    def max_blocks(self, num_rows: int) -> int:
        """Bound of the number of blocks of all groups, at least one each, whatever the groups' sizes."""
        return num_rows // max(self.sizes) + self.begin_G.size * self.tail_GB.shape[1]

    def block(self, group: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and size (as index into `sizes`; their number where there is no block) of a group's block."""
        largest = max(self.sizes)
        whole, tail = self.whole_G[group], self.tail_GB[group]
        rows_B = jnp.where(tail >= 0, jnp.asarray(self.sizes)[tail], 0)
        before_B = jnp.cumsum(rows_B, -1) - rows_B
        in_tail = jnp.clip(index - whole, 0, tail.shape[-1] - 1)[..., None]
        is_whole = index < whole
        before = jnp.where(is_whole, index * largest, whole * largest + jnp.take_along_axis(before_B, in_tail, -1)[..., 0])
        size = jnp.where(is_whole, self.sizes.index(largest), jnp.take_along_axis(tail, in_tail, -1)[..., 0])
        return self.begin_G[group] // self.pack * self.pack + before, jnp.where(size >= 0, size, len(self.sizes))


def cut_groups(group_sizes_G: jax.Array, sizes: tuple[int, ...], cost: BlockCost, pack: int = PACK) -> Cut:
    """Cuts each group into blocks that start at multiples of `pack` rows, at the least cost.

    Args:
      group_sizes_G: rows of each group, int32.
      sizes: rows of a block for which there is code, multiples of `pack`.
      cost: what a block costs.
    """
    sums = best_sums(sizes, cost, pack)
    largest, reach = max(sizes) // pack, sums.shape[0] - 1
    end_G = jnp.cumsum(group_sizes_G)
    begin_G = end_G - group_sizes_G
    packs_G = jnp.where(group_sizes_G > 0, -(-end_G // pack) - begin_G // pack, 0)
    # Blocks of the largest size are cut off as long as more is left than the table reaches.
    whole_G = jnp.maximum(0, -(-(packs_G - reach) // largest))
    tail_GB = jnp.asarray(sums)[packs_G - whole_G * largest]
    return Cut(sizes, pack, begin_G, end_G, whole_G + (tail_GB >= 0).sum(1), whole_G, tail_GB)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """Blocks in the order of rows, for a kernel's scalar memory.

    Attributes:
      blocks: int32 [6, P], see FIELDS; P is a bound that holds for any sizes of groups.
      counts: int32 [2], blocks and groups in use.
      groups: int32 [G], groups that have rows, in order.
    """

    blocks: jax.Array
    counts: jax.Array
    groups: jax.Array


# Of each block: its first row (a multiple of a pack), index of its size, which of the groups in use it belongs to, rows to read
# (likewise), rows to write (likewise), rows at its head that belong to earlier groups.
START, SIZE, GROUP, READ, WRITE, HEAD = FIELDS = range(6)


def cut_rows(group_sizes_G: jax.Array, num_rows: int, sizes: tuple[int, ...], cost: BlockCost, pack: int = PACK) -> RowBlocks:
    """The blocks of all groups. `num_rows` is a multiple of `pack`; the groups' rows may fall short of it by less than that.

    A pack that several groups share is read for each of them, and written with the last.
    """
    cut = cut_groups(group_sizes_G, sizes, cost, pack)
    last_G = jnp.cumsum(cut.blocks_G)
    block_P = jnp.arange(cut.max_blocks(num_rows))
    group_P = jnp.minimum((block_P[:, None] >= last_G).sum(1), group_sizes_G.size - 1)
    start_P, size_P = cut.block(group_P, block_P - (last_G - cut.blocks_G)[group_P])
    block_end_P = start_P + jnp.asarray((*sizes, 0))[size_P]
    end_P = cut.end_G[group_P]
    read_P = jnp.minimum(block_end_P, -(-end_P // pack) * pack) - start_P
    write_P = jnp.minimum(block_end_P, end_P // pack * pack) - start_P
    write_P = jnp.where(block_P == last_G[-1] - 1, read_P, write_P)
    head_P = jnp.maximum(cut.begin_G[group_P] - start_P, 0)

    used_G = group_sizes_G > 0
    ordinal_G = jnp.cumsum(used_G) - 1
    num_groups = group_sizes_G.size
    groups = jnp.zeros(num_groups, jnp.int32).at[jnp.where(used_G, ordinal_G, num_groups)].set(jnp.arange(num_groups), mode="drop")
    fields = (start_P, size_P, ordinal_G[group_P], read_P, write_P, head_P)
    counts = jnp.stack([last_G[-1], ordinal_G[-1] + 1])
    return RowBlocks(jnp.stack(fields).astype(jnp.int32), counts.astype(jnp.int32), groups.astype(jnp.int32))
