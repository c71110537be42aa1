"""The attention kernels of a training step at the released model's sizes, each for one row that is one document: this project's, forward
with what the backward pass needs and for the gradients, and splash, which takes over where a row is too long for them.

Work is what `interns1pro_jax.train.hlo_cost.kernel_cost` counts, so that a ratio here is what `train.timeline` multiplies its bound
with: the products of all blocks of scores that are visited, those on the diagonal whole but for what stairs and the later half of the
queries leave out.

A schedule does not know which blocks are visited, since tables in scalar memory say so. But each way through a kernel is a region of its
own, so a step of the grid takes the sum of its parts: what every step takes, and besides what it takes to begin or end a sum, and each
block that it visits. Splash has one way through a block, masked or not, and takes a step for each block that it does not visit, too. This
project's kernels have an inner loop over the chunks of keys that they visit, with a way for each kind of chunk: seen wholly or partly, and
forward two kinds of stairs, for the gradients what only the later half of the queries sees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from interns1pro_jax.config import ModelConfig
from pallas_kernels import attention, chips
from pallas_kernels.attention_forward import STAIRS, STAIRS_PARTLY, attention_forward, columns_of
from pallas_kernels.attention_gradient import HIDDEN, LANES, LATER, PARTLY, WHOLLY, attention_gradient, has_later_half
from tools.kernels.cases import Case, Work
from tools.kernels.chips import Chip
from tools.kernels.compile import Compilation, Launch
from tools.kernels.pipeline import Block, Visit, pipelined
from tools.kernels.schedule import Region, Schedule, ScheduleError
from tools.kernels.simulate import Program

_TEXT = ModelConfig().text
_Q, _K, _H = _TEXT.num_attention_heads, _TEXT.num_key_value_heads, _TEXT.head_dim
_SHARE = _Q // _K  # query heads of a key head
_BF16, _F32, _SUBLANES = 2, 4, 8


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A kernel.

    Attributes:
      products: of a block; `over_width` of them contract over the width of a head, which matrix units do in whole tiles. In the others the
        width may be that of the rows that are streamed.
      arrays: that are moved once: of the queries' shape, of the keys', and of a number per query.
      sight: what is seen of the blocks, from tokens, queries and keys.
      launch: for so many tokens.
      visits: of the heads that share keys, from what is seen of the blocks, their queries and keys, the schedule, operations of a cycle,
        and the key head.
    """

    name: str
    products: int
    over_width: int
    arrays: tuple[int, int, int]
    sight: Callable[[int, int, int], np.ndarray]
    launch: Callable[[int, Chip], Launch]
    visits: Callable[[np.ndarray, int, int, Schedule, float, int], Iterator[Visit]]


def cases(chip: Chip) -> list[Case]:
    """Rows of 4,096 tokens, and forward of 32,768, whose gradients do not fit the vector memory of v5p."""
    tiling = _tiling(chip)
    splash = _Pass("attention by splash", 2, 1, (2, 2, 1), sight, _launch_splash, splash_visits)
    forward = _Pass("attention", 2, 1, (2, 2, 1), forward_sight, _launch_forward, forward_visits)
    gradient = _Pass("gradient of attention", 5, 2, (4, 4, 1), gradient_sight, _launch_gradient, gradient_visits)
    return [_case(forward, 4096, tiling.short), _case(gradient, 4096, tiling.gradient), _case(splash, 32768, tiling.forward)]


def _case(of: _Pass, tokens: int, blocks: tuple[int, ...]) -> Case:
    queries, keys = blocks[:2]
    seen = of.sight(tokens, queries, keys)
    share = {HIDDEN: 0.0, LATER: 0.5, STAIRS: (1 + columns_of(queries) / queries) / 2}
    scores = queries * keys * sum(share.get(int(state), 1.0) for state in seen.ravel())
    like_queries, like_keys, numbers = of.arrays
    moved = tokens * (_BF16 * _H * (like_queries * _Q + like_keys * _K) + _F32 * _Q * numbers)
    work = Work(2.0 * of.products * _Q * _H * scores, float(moved))

    def program(chip: Chip, compilation: Compilation, _sizes: np.ndarray) -> Program:
        of_cycle = chip.flops[work.dtype] / chip.cores / chip.clock
        cores = (
            [visit for head in share for visit in of.visits(seen, queries, keys, compilation.main, of_cycle, int(head))]
            for share in np.array_split(np.arange(_K), chip.cores)
        )
        return Program(tuple(pipelined(core, dict.fromkeys(core[0].inputs, 2)) for core in cores))

    def least_flops(chip: Chip, _sizes: np.ndarray) -> float:
        return work.flops * (1 + (max(chip.depth / _H, 1) - 1) * of.over_width / of.products)

    title = f"{of.name}, {tokens} tokens, blocks of {' x '.join(map(str, blocks))}"
    return Case(title, functools.partial(of.launch, tokens), work, program, least_flops)


def sight(tokens: int, queries: int, keys: int) -> np.ndarray:
    """What the queries of each block see of each block of keys in a row that is one document, int [blocks, blocks of keys]."""
    first, start = np.arange(0, tokens, queries)[:, None], np.arange(0, tokens, keys)
    return np.where(start + keys <= first + 1, WHOLLY, np.where(start < first + queries, PARTLY, HIDDEN))


def forward_sight(tokens: int, queries: int, keys: int) -> np.ndarray:
    """The same as `attention_forward` is told it: blocks on the diagonal are stairs."""
    seen = sight(tokens, queries, keys)
    return np.where(seen == PARTLY, STAIRS, seen) if queries == keys else seen


def gradient_sight(tokens: int, queries: int, keys: int) -> np.ndarray:
    """The same as `attention_gradient` is told it: of some blocks on the diagonal only the later half of the queries see anything."""
    seen = sight(tokens, queries, keys)
    if not has_later_half(queries):
        return seen
    return np.where((seen == PARTLY) & (sight(tokens, queries // 2, keys)[::2] == HIDDEN), LATER, seen)


def splash_visits(seen: np.ndarray, queries: int, keys: int, schedule: Schedule, of_cycle: float, head: int) -> Iterator[Visit]:
    """Of the query heads of a key head. Segments and indices are spread over registers' width, and so are the denominators. Where keys and
    these fit, XLA keeps them in vector memory, as it does in a step, and the loop starts transfers of queries alone."""
    (grid,), (block,), (begin, end) = _regions(schedule, loops=1, ways=1, ends=2)
    always = grid.total.cycles - begin - block.total.cycles - end
    last = seen.shape[1] - 1
    for of_head in range(_SHARE):
        for row, states in enumerate(seen):
            end_of_row = int(np.flatnonzero(states > HIDDEN)[-1])
            for chunk, state in enumerate(states):
                at, visited = min(chunk, end_of_row), state > HIDDEN
                cycles = always + begin * (chunk == 0) + block.total.cycles * visited + end * (chunk == last)
                inputs: dict[str, Block] = {"q": ((head, of_head, row), float(_BF16 * _H * queries))}
                if grid.own.transfers > 1:
                    inputs["k and v"] = (head, at), float(2 * _BF16 * _H * keys)
                    inputs["places of q"] = row, float(2 * _F32 * LANES * queries)
                    inputs["segments of k"] = at, float(_F32 * _SUBLANES * keys)
                written = float(queries * (_BF16 * _H + _F32 * LANES))
                yield Visit(cycles, block.total.matrix_cycles * visited * of_cycle, inputs, ((head, of_head, row), written))


def gradient_visits(seen: np.ndarray, queries: int, keys: int, schedule: Schedule, of_cycle: float, head: int) -> Iterator[Visit]:
    """Of the query heads of a key head, behind the last of which the gradients of keys and values are written."""
    states = (WHOLLY, PARTLY, *((LATER,) if has_later_half(queries) else ()))
    (grid, inner), ways, (begin, end) = _regions(schedule, loops=2, ways=len(states), ends=2)
    of = dict(zip(states, ways, strict=True))
    always = grid.total.cycles - begin - inner.total.cycles - end
    of_keys = float(2 * _BF16 * _H * keys * seen.shape[1])
    for of_head in range(_SHARE):
        for row, visited in enumerate(seen):
            passes, matrix = _passes(inner, of, visited)
            first, last = (of_head, row) == (0, 0), (of_head, row) == (_SHARE - 1, len(seen) - 1)
            cycles = always + begin * first + passes + end * last
            inputs: dict[str, Block] = {
                "q": ((head, of_head, row), float(queries * (3 * _BF16 * _H + _F32))),
                "k and v": (head, of_keys),
                "places of q": (row, float(2 * _F32 * queries)),
                "segments of k": (0, float(_F32 * LANES * keys * seen.shape[1])),
            }
            written = float(_BF16 * _H * queries) + of_keys * last
            yield Visit(cycles, matrix * of_cycle, inputs, ((head, of_head, row), written))


def forward_visits(seen: np.ndarray, queries: int, keys: int, schedule: Schedule, of_cycle: float, head: int) -> Iterator[Visit]:
    """Of the query heads of a key head, each a step of the grid. It computes the scores of half a chunk before its loop, which the loop's
    last pass computes once more in vain; behind the last chunk of a block is what ends its sums."""
    states = (WHOLLY, PARTLY, *((STAIRS, STAIRS_PARTLY) if queries == keys else ()))
    (grid, inner), ways, (end,) = _regions(schedule, loops=2, ways=len(states), ends=1)
    passes, matrix = _passes(inner, dict(zip(states, ways, strict=True)), seen.ravel(), end)
    tokens = queries * len(seen)
    for of_head in range(_SHARE):
        inputs: dict[str, Block] = {
            "q": ((head, of_head), float(tokens * _BF16 * _H)),
            "k and v": (head, float(2 * _BF16 * _H * keys * seen.shape[1])),
            "places of q": (0, float(2 * _F32 * tokens)),
            "segments of k": (0, float(_F32 * LANES * keys * seen.shape[1])),
        }
        cycles = grid.total.cycles - inner.total.cycles + passes + end * len(seen)
        yield Visit(cycles, matrix * of_cycle, inputs, ((head, of_head), float(tokens * (_BF16 * _H + _F32))))


def _passes(inner: Region, ways: dict[int, Region], states: np.ndarray, end: int = 0) -> tuple[int, float]:
    """Cycles, and cycles of products, of a loop over the chunks that are seen, without what `end` takes inside it."""
    between = inner.total.cycles - sum(way.total.cycles for way in ways.values()) - end
    passes = [ways[int(state)].total for state in states if state > HIDDEN]
    return sum(between + way.cycles for way in passes), sum(way.matrix_cycles for way in passes)


def _regions(schedule: Schedule, loops: int, ways: int, ends: int) -> tuple[list[Region], list[Region], list[int]]:
    """Loops around all products of a block, outermost first; the regions that hold these; cycles of what begins and what ends a sum.

    Raises:
      ScheduleError: there are not so many loops and ways through a block, or not so many regions without products.
    """
    regions, hot = list(schedule.root.walk()), schedule.hot_regions()
    hot = [region for region in hot if not any(inside in hot for inside in list(region.walk())[1:])]
    around = [region for region in regions if region.kind == "loop" and all(region.start <= x.start and x.end <= region.end for x in hot)]
    without = [region.total.cycles for region in regions if region.kind == "branch" and not (region.children or region.total.matmuls)]
    if (len(around), len(hot), len(without)) != (loops, ways, ends):
        raise ScheduleError(
            f"kernel {schedule.name} has {len(around)} loops around {len(hot)} regions of products and {len(without)} without, expected "
            f"{loops}, {ways} and {ends}:\n{schedule.root.tree()}"
        )
    return around, hot, without


def _launch_splash(tokens: int, chip: Chip) -> Launch:
    """By way of its derivative, so that what the backward pass needs is kept."""
    tiling = dataclasses.replace(attention.tiling_of(chips.CHIPS[chip.name]), vmem=0)

    def function(q, k, v, segment, index):  # type: ignore[no-untyped-def]
        def call(q, k, v):  # type: ignore[no-untyped-def]
            return attention.attention(q, k, v, segment, segment, index, causal=True, scale=_H**-0.5, tiling=tiling)

        return jax.vjp(call, q, k, v)

    heads = (jax.ShapeDtypeStruct((1, tokens, count, _H), jnp.bfloat16) for count in (_Q, _K, _K))
    return Launch(function, (*heads, *(jax.ShapeDtypeStruct((1, tokens), jnp.int32),) * 2))


def _launch_forward(tokens: int, chip: Chip) -> Launch:
    q, k = (jax.ShapeDtypeStruct((1, count, tokens, _H), jnp.bfloat16) for count in (_Q, _K))
    return Launch(functools.partial(attention_forward, causal=True), (q, k, k, *_places(tokens, _tiling(chip).short)))


def _launch_gradient(tokens: int, chip: Chip) -> Launch:
    q, k = (jax.ShapeDtypeStruct((1, count, tokens, _H), jnp.bfloat16) for count in (_Q, _K))
    out, number = jax.ShapeDtypeStruct((1, tokens, _Q * _H), jnp.bfloat16), jax.ShapeDtypeStruct((1, _Q, tokens), jnp.float32)
    return Launch(functools.partial(attention_gradient, causal=True), (q, k, k, out, out, number, *_places(tokens, _tiling(chip).gradient)))


def _tiling(chip: Chip) -> attention.Tiling:
    return attention.tiling_of(chips.CHIPS[chip.name])


def _places(tokens: int, blocks: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Segments, indices and what is seen."""
    queries, keys = blocks
    shapes = *((1, tokens),) * 3, (1, tokens // queries, tokens // keys)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
