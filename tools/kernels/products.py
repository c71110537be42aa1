"""The six grouped products of one expert layer at the size of the released model, and sizes of groups to try them on."""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.kernels.cases import Work
from tools.kernels.chips import Chip

GROUPS = 64
PACK = 16  # rows of bfloat16 that a matrix unit takes at once


@dataclasses.dataclass(frozen=True)
class Product:
    """`kind` forward: rows [M, k] with matrices [G, k, n]; input_gradient: with transposed [G, n, k]; weight_gradient: rows [M, k]
    with rows [M, n] into [G, k, n]."""

    name: str
    kind: str
    k: int
    n: int

    def work(self, rows: int) -> Work:
        """In bfloat16: rows in, rows out (or in), and one matrix per group."""
        return Work(2.0 * rows * self.k * self.n, 2.0 * (rows * (self.k + self.n) + GROUPS * self.k * self.n))

    def least_flops(self, chip: Chip, sizes: np.ndarray) -> float:
        """Operations that no kernel can avoid: each group's rows are streamed in whole packs, or contracted in whole tiles."""
        granule = chip.depth if self.kind == "weight_gradient" else PACK
        return 2.0 * float((-(-sizes // granule) * granule).sum()) * self.k * self.n


# The up projection holds gate and up side by side: 4096 -> 2 x 1536.
PRODUCTS = {
    product.name: product
    for product in (
        Product("up_fwd", "forward", 4096, 3072),
        Product("dn_fwd", "forward", 1536, 4096),
        Product("up_dlhs", "input_gradient", 3072, 4096),
        Product("dn_dlhs", "input_gradient", 4096, 1536),
        Product("up_drhs", "weight_gradient", 4096, 3072),
        Product("dn_drhs", "weight_gradient", 1536, 4096),
    )
}

SIZES = {"rnd": "multinomial, popularity lognormal(0.5), seed 0", "eq": "all equal"}


def group_sizes(rows: int, kind: str) -> np.ndarray:
    """Rows of each of the 64 groups; `kind` is one of SIZES. They sum to `rows`."""
    if kind == "eq":
        if rows % GROUPS:
            raise ValueError(f"{rows} rows do not divide into {GROUPS} equal groups; take a multiple, or sizes 'rnd'.")
        return np.full(GROUPS, rows // GROUPS)
    if kind != "rnd":
        raise ValueError(f"sizes {kind!r}; known are {', '.join(SIZES)}.")
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(0, 0.5, GROUPS)
    return rng.multinomial(rows, popularity / popularity.sum())
