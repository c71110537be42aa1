"""The choice of tiles: what it chooses fits, and the time that it goes by lies where it must."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import product_model
from pallas_kernels.chips import CHIPS
from pallas_kernels.row_blocks import cut_rows
from pallas_kernels.tiling import WEIGHT, product_tiling

K, N, GROUPS = 4096, 3072, 64


@pytest.mark.parametrize("rows", [64, 8192, 32768, 262144])
@pytest.mark.parametrize("kind", ["forward", "transposed", "gated"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_rings_fit_vector_memory_and_hold_what_is_read_ahead(chip, kind, rows):
    columns, parts = (N // 2, 2) if kind == "gated" else (N, 1)
    tiling = product_tiling(chip, rows, K, columns, GROUPS, 2, 2, transposed=kind == "transposed", gated=kind == "gated")
    panel, block = columns // tiling.panels, max(tiling.block_rows)
    matrices = tiling.matrices * K * panel * parts * 2
    held = (tiling.read_ahead + 1) * block * (K * 2 + WEIGHT * (parts - 1)) + tiling.results * block * panel * 2
    assert matrices + held < tiling.vmem_limit <= chip.vmem
    assert tiling.results >= 2 and tiling.panels % chip.cores == 0 and panel * parts % tiling.columns == 0


@pytest.mark.parametrize("rows", [8192, 65536])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_modelled_time_lies_between_its_bounds(chip, rows):
    """No shorter than compute or transfers alone, no longer than one after the other."""
    sizes = np.random.default_rng(0).multinomial(rows, np.random.default_rng(1).dirichlet(np.full(GROUPS, 2.0)))
    tiling = product_tiling(chip, rows, K, N, GROUPS, 2, 2)
    blocks = product_model.cut(sizes, tiling.block_rows, tiling.cost)
    panel = N // tiling.panels
    seconds = product_model.seconds(chip, tiling, blocks, K * 2, panel * 2, K * panel * 2)
    compute = sum(tiling.cost(size) for _, size in blocks) / chip.clock
    moved = sum(size for _, size in blocks) * (K + panel) * 2 + len({group for group, _ in blocks}) * K * panel * 2
    assert max(compute, moved * chip.cores / chip.hbm) <= seconds <= compute + moved * chip.cores / chip.hbm


def test_blocks_are_those_of_the_kernel():
    """For groups that start with a pack."""
    sizes, tiling = np.array([48, 640, 0, 16, 2000, 304]), product_tiling(CHIPS["v6e"], 3008, K, N, 6, 2, 2)
    blocks = product_model.cut(sizes, tiling.block_rows, tiling.cost)
    found = cut_rows(jnp.asarray(sizes, jnp.int32), int(sizes.sum()), tiling.block_rows, tiling.cost)
    indices = np.asarray(found.blocks)[1, : int(found.counts[0])]
    assert [size for _, size in blocks] == [tiling.block_rows[index] for index in indices]
