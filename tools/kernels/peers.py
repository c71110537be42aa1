"""Public kernels for grouped products: how they are called, and what they do step by step.

megablox is JAX's own; tokamax's first kernels share its grid: tiles of rows at fixed places, visited once more for each further
group in them. tokamax's second kernels start a tile at each group's own first row, compute it in row buckets, and keep three buffers
of weights. Tilings are those that were best in an earlier search; each cell of the report takes the best of them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tools.kernels.cases import Case
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.products import GROUPS, Product
from tools.kernels.schedule import Region, Schedule, ScheduleError
from tools.kernels.simulate import Program

Contender = Callable[[Chip, Product, int], list[Case]]
Tiling = tuple[int, ...]  # rows, contracted (weight gradient: left features), result's features

_ROWS = 8192  # compiled once: neither tiles nor schedule depend on the number of rows
_SUBLANES = 16  # rows of bfloat16 in a register tile, to which tokamax's second kernels align
_SHIPPED = (512, 1024, 1024)  # what MaxText passes by default
_TILINGS = {
    "up_fwd": ((256, 4096, 1024), _SHIPPED, (512, 4096, 512)),
    "dn_fwd": ((256, 1536, 2048), _SHIPPED, (512, 1536, 1024)),
    "up_dlhs": ((256, 3072, 1024), _SHIPPED),
    "dn_dlhs": ((256, 4096, 768), _SHIPPED),
    "up_drhs": ((256, 2048, 1024), _SHIPPED),
    "dn_drhs": ((256, 1536, 1024), _SHIPPED),
}


def megablox(chip: Chip, product: Product, rows: int) -> list[Case]:
    return [_fixed_tiles("megablox", _call_megablox, product, rows, tiling) for tiling in _TILINGS[product.name]]


def tokamax_v1(chip: Chip, product: Product, rows: int) -> list[Case]:
    return [_fixed_tiles("tokamax v1", _call_tokamax_v1, product, rows, tiling) for tiling in _TILINGS[product.name]]


def tokamax_v2(chip: Chip, product: Product, rows: int) -> list[Case]:
    """With the tiles of its own heuristic, with MaxText's, and where its own do not fit the VMEM with the next best."""
    tilings: list[Tiling | None] = [None, (*_SHIPPED, 512)]
    if (chip.name, product.name) == ("v5p", "dn_dlhs"):
        tilings.append((512, 4096, 1536, 256))
    return [
        Case(
            f"tokamax v2 {product.name} {'own heuristic' if tiling is None else _written(tiling)}",
            functools.partial(_launch, functools.partial(_call_tokamax_v2, tiling=tiling), product, scoped_vmem=False),
            product.work(rows),
            functools.partial(_bucketed_program, product),
            product.least_flops,
        )
        for tiling in tilings
    ]


def installed() -> dict[str, Contender]:
    """The peers that can be imported here, by name."""
    peers: dict[str, Contender] = {"megablox": megablox}
    if importlib.util.find_spec("tokamax"):
        peers |= {"tokamax v1": tokamax_v1, "tokamax v2": tokamax_v2}
    return peers


def _written(tiling: Tiling) -> str:
    return ",".join(map(str, tiling))


# -- Calls -------------------------------------------------------------------------------------------------------------------------


def _launch(call, product: Product, chip: Chip, *, scoped_vmem: bool) -> Launch:  # type: ignore[no-untyped-def]
    lhs, sizes = jax.ShapeDtypeStruct((_ROWS, product.k), jnp.bfloat16), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    shape = {
        "forward": (GROUPS, product.k, product.n),
        "input_gradient": (GROUPS, product.n, product.k),
        "weight_gradient": (_ROWS, product.n),
    }[product.kind]
    # The compiler's default limit holds few of the tilings; kernels that set their own limit are left alone.
    options = {"xla_tpu_scoped_vmem_limit_kib": str(98304 if chip.vmem > 64 << 20 else 57344)} if scoped_vmem else {}
    return Launch(functools.partial(call, product.kind), (lhs, jax.ShapeDtypeStruct(shape, jnp.bfloat16), sizes), options)


def _call_megablox(kind: str, lhs, rhs, sizes, *, tiling: Tiling):  # type: ignore[no-untyped-def]
    import jax.experimental.pallas.ops.tpu.megablox.gmm  # noqa: F401  (the package's attribute `gmm` is a function)

    kernels = sys.modules["jax.experimental.pallas.ops.tpu.megablox.gmm"]
    if kind == "weight_gradient":
        return kernels.tgmm(lhs.swapaxes(0, 1), rhs, sizes, jnp.bfloat16, tiling=tiling)
    return kernels.gmm(lhs, rhs, sizes, jnp.bfloat16, tiling=tiling, transpose_rhs=kind == "input_gradient")


def _call_tokamax_v1(kind: str, lhs, rhs, sizes, *, tiling: Tiling):  # type: ignore[no-untyped-def]
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernels

    keywords = dict(precision=jax.lax.Precision.DEFAULT, out_dtype=jnp.bfloat16, tiling=tiling, input_buffer_count=2)
    if kind == "weight_gradient":
        return kernels.tgmm(lhs.swapaxes(0, 1), rhs, sizes, **keywords)
    return kernels.gmm(lhs, rhs, sizes, transpose_rhs=kind == "input_gradient", **keywords)


def _call_tokamax_v2(kind: str, lhs, rhs, sizes, *, tiling: Tiling | None):  # type: ignore[no-untyped-def]
    from tokamax._src.ops.gmm_v2 import gmm_v2, tgmm_v2

    keywords = {"preferred_element_type": jnp.dtype(jnp.bfloat16)}
    if tiling is not None:
        keywords["tile_info"] = gmm_v2.TileSizes(**dict(zip(("tile_m", "tile_k", "tile_n", "bucket_base"), tiling, strict=True)))
    if kind == "weight_gradient":
        return tgmm_v2.tgmm_v2(lhs, rhs, sizes, GROUPS, **keywords)
    options = dict(maybe_quantize_lhs=False, zero_initialize=False, transpose_rhs=kind == "input_gradient")
    return gmm_v2.gmm_v2(lhs, rhs, sizes, **options, **keywords)


# -- Steps -------------------------------------------------------------------------------------------------------------------------


def grid_loop(schedule: Schedule) -> Region:
    """The innermost loop around all products: its passes are the steps of the grid."""
    hot = schedule.hot_regions()
    loops = [
        region
        for region in schedule.root.walk()
        if region.kind == "loop" and all(region.start <= inner.start and inner.end <= region.end for inner in hot)
    ]
    if not hot or not loops:
        raise ScheduleError(f"kernel {schedule.name} has no loop around its products:\n{schedule.root.tree()}")
    return loops[-1]


def _shares(count: int, cores: int) -> Iterator[range]:
    """Tiles of a parallel grid dimension for each core."""
    each = math.ceil(count / cores)
    return (range(first, min(first + each, count)) for first in range(0, count, each))


def _fixed_tiles(name: str, call, product: Product, rows: int, tiling: Tiling) -> Case:  # type: ignore[no-untyped-def]
    return Case(
        f"{name} {product.name} {_written(tiling)}",
        functools.partial(_launch, functools.partial(call, tiling=tiling), product, scoped_vmem=True),
        product.work(rows),
        functools.partial(_fixed_program, product, tiling),
        product.least_flops,
    )


def _tiles_at_fixed_places(sizes: np.ndarray, tile: int) -> list[tuple[int, int]]:
    """(tile, group) of each visit, in order."""
    ends = np.cumsum(sizes)
    return [
        (place, group)
        for group, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size
        for place in range((end - size) // tile, (end - 1) // tile + 1)
    ]


def _fixed_program(product: Product, tiling: Tiling, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    """Steps of megablox and tokamax's first kernels.

    In the loop over the grid the products stand in one region, or in two of which the dearer masks and stores the last part of a sum;
    code under a condition before them clears the sum, code after them stores it.
    """
    tile_m, tile_k, tile_n = tiling
    loop = grid_loop(compilation.main)
    hot = compilation.main.hot_regions(least=0.9)
    middle = (hot[0].start + hot[0].end) / 2
    others = [region for region in loop.walk() if region.kind == "branch" and not region.total.matmuls]
    before = sum(region.own.cycles for region in others if region.start < middle)
    after = sum(region.own.cycles for region in others if region.start >= middle)
    variants = sorted(region.own.cycles for region in hot)
    always = loop.total.cycles - before - after - sum(variants)
    visits = _tiles_at_fixed_places(sizes, tile_m)
    flops = 2.0 * tile_m * tile_k * tile_n

    def forward(tiles_n: range) -> Iterator[Visit]:
        tiles_k = math.ceil(product.k / tile_k)
        for n in tiles_n:
            for tile, group in visits:
                for k in range(tiles_k):
                    last = k == tiles_k - 1
                    cycles = always + (before if k == 0 else 0) + (after if last else 0) + variants[-1 if last else 0]
                    inputs = {"lhs": ((tile, k), 2.0 * tile_m * tile_k), "rhs": ((group, k, n), 2.0 * tile_k * tile_n)}
                    yield Visit(cycles, flops, inputs, ((tile, n), 2.0 * tile_m * tile_n))

    def weight_gradient(tiles: range) -> Iterator[Visit]:
        tiles_k = math.ceil(product.k / tile_k)
        for kn in tiles:
            n, k = divmod(kn, tiles_k)
            for place, (tile, group) in enumerate(visits):
                first = place == 0 or visits[place - 1][1] != group
                last = place + 1 == len(visits) or visits[place + 1][1] != group
                cycles = always + (before if first else 0) + (after if last else 0) + float(np.mean(variants))
                inputs = {"lhs": ((tile, k), 2.0 * tile_m * tile_k), "rhs": ((tile, n), 2.0 * tile_m * tile_n)}
                yield Visit(cycles, flops, inputs, ((group, kn), 2.0 * tile_k * tile_n))

    buffers = {"lhs": 2, "rhs": 2}
    tiles_n = math.ceil(product.n / tile_n)
    if product.kind == "weight_gradient":
        tiles = tiles_n * math.ceil(product.k / tile_k)
        return Program(tuple(pipelined(list(weight_gradient(share)), buffers) for share in _shares(tiles, chip.cores)))
    return Program(tuple(pipelined(list(forward(share)), buffers) for share in _shares(tiles_n, chip.cores)))


def _tiles_of_groups(sizes: np.ndarray, tile: int) -> list[tuple[int, int, int]]:
    """(first row, end, group) of each visit: a group's tiles start at its first row, aligned downwards."""
    visits, row = [], 0
    for group, size in enumerate(sizes):
        end = row + int(size)
        while row < end:
            step = min(tile - row % _SUBLANES, end - row)
            visits.append((row, row + step, group))
            row += step
    return visits


def _bucketed_program(product: Product, chip: Chip, compilation: Compilation, sizes: np.ndarray) -> Program:
    """Steps of tokamax's second kernels: as many rows are computed as the bucket of a visit's rows holds."""
    schedule = compilation.main
    named = re.search(r"tm_(\d+)-tk_(\d+)-tn_(\d+)", schedule.name)
    if named is None:
        raise ScheduleError(f"kernel {schedule.name} does not name its tiles.")
    tile_m, tile_k, tile_n = map(int, named.groups())
    loop, hot = grid_loop(schedule), schedule.hot_regions()
    most = max(region.own.matmuls for region in hot)
    cycles_by_rows = defaultdict(list)
    for region in hot:
        cycles_by_rows[round(tile_m * region.own.matmuls / most)].append(region.own.cycles)
    bucket = min(cycles_by_rows)
    always = loop.total.cycles - sum(region.own.cycles for region in hot)
    tiles_n, tiles_k = math.ceil(product.n / tile_n), math.ceil(product.k / tile_k)
    visits = [(first, end, group, end - first + first % _SUBLANES) for first, end, group in _tiles_of_groups(sizes, tile_m)]

    def computed(rows: int) -> tuple[float, float]:
        """Cycles and floating-point operations of a tile of so many rows."""
        held = min((rows // bucket + 1) * bucket, tile_m)
        return always + float(np.mean(cycles_by_rows[held])), 2.0 * held * tile_k * tile_n

    def forward(share: range) -> Iterator[Visit]:
        for n in share:
            for first, end, group, rows in visits:
                for k in range(tiles_k):
                    lhs = ((first, k, n), 2.0 * math.ceil(rows / _SUBLANES) * _SUBLANES * tile_k)
                    inputs = {"lhs": lhs, "rhs": ((group, k, n), 2.0 * tile_k * tile_n)}
                    yield Visit(*computed(rows), inputs, ((first, n), 2.0 * (end - first) * tile_n))

    def weight_gradient(share: range) -> Iterator[Visit]:
        for kn in share:
            for first, _, group, rows in visits:
                inputs = {"lhs": ((first, kn), 2.0 * rows * tile_k), "rhs": ((first, kn), 2.0 * rows * tile_n)}
                yield Visit(*computed(rows), inputs, ((group, kn), 2.0 * tile_k * tile_n))

    if product.kind == "weight_gradient":
        cores = [pipelined(list(weight_gradient(share)), {"lhs": 2, "rhs": 2}) for share in _shares(tiles_n * tiles_k, chip.cores)]
    else:
        cores = [pipelined(list(forward(share)), {"lhs": 2, "rhs": 3}) for share in _shares(tiles_n, chip.cores)]
    return Program(tuple(cores))
