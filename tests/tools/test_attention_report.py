"""The report on attention kernels: which blocks are visited, what their steps take, and that their work is what the timeline counts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.train import hlo, hlo_cost
from pallas_kernels import attention as kernels
from pallas_kernels.attention_forward import STAIRS
from pallas_kernels.attention_gradient import HIDDEN, LATER, PARTLY, WHOLLY
from tools.kernels import attention
from tools.kernels.chips import CHIPS
from tools.kernels.schedule import Counts, Region, Schedule, ScheduleError

TOKENS, HEADS = 2048, 16  # query heads of a key head


@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (512, 256), (256, 512)])
def test_visited_blocks_are_those_that_the_kernels_are_told(queries, keys):
    segment, index = jnp.ones(TOKENS, jnp.int32), jnp.arange(TOKENS)
    found = attention.sight(TOKENS, queries, keys)
    assert {*found.ravel()} == {HIDDEN, PARTLY, WHOLLY}
    np.testing.assert_array_equal(found, kernels._sight(segment, segment, index, queries, keys, True))
    np.testing.assert_array_equal(found > HIDDEN, kernels._seen(segment, segment, index, queries, keys, True))


def test_blocks_on_the_diagonal_are_what_the_kernels_are_told():
    """Those of the gradients are told in `attention._backward`, here from halves of their blocks."""
    ones, index = jnp.ones(TOKENS, jnp.int32), jnp.arange(TOKENS)
    stairs = kernels._stairs(ones, ones, index, 512, 256)
    found = attention.forward_sight(TOKENS, 512, 512)
    np.testing.assert_array_equal(found == STAIRS, (stairs == STAIRS) & (found > HIDDEN) & (found != WHOLLY))
    assert {*found.ravel()} == {HIDDEN, WHOLLY, STAIRS} and PARTLY in attention.forward_sight(TOKENS, 512, 256)
    later = attention.gradient_sight(TOKENS, 512, 256) == LATER
    blocks = np.tril(np.ones((TOKENS, TOKENS), bool)).reshape(TOKENS // 512, 2, 256, TOKENS // 256, 256).any((2, 4))
    np.testing.assert_array_equal(later, ~blocks[:, 0] & blocks[:, 1])


def region(kind, start, end, cycles, *inside, matmuls=0, transfers=0):
    """A region with so many cycles and transfers of its own; each product takes 100 cycles of the matrix units."""
    of = [child.total for child in inside]
    matmuls += sum(counts.matmuls for counts in of)
    return Region(
        kind, start, end, inside, Counts(0, cycles + sum(counts.cycles for counts in of), matmuls, 100.0 * matmuls, 0, 0, transfers)
    )


BEGIN, END = region("branch", 3, 5, 100_000), region("branch", 90, 95, 1_000_000)


def kernel(*inside, transfers=0):
    """What holds products is inside the grid's loop, between what begins and what ends a sum."""
    step = region("branch", 2, 97, 4, BEGIN, *inside, END)
    return Schedule("toy", region("kernel", 0, 100, 9, region("loop", 1, 98, 3, step, transfers=transfers)))


WAY = region("branch", 10, 20, 1000, matmuls=5)
FORWARD = kernel(WAY, transfers=2)


def chunks(*more):
    """Ways through a chunk in the order of the code: wholly seen, with a mask, and others."""
    starts = range(12, 12 + 4 * (2 + len(more)), 4)
    return [region("branch", start, start + 3, cycles, matmuls=5) for start, cycles in zip(starts, (1000, 2000, *more), strict=True)]


GRADIENT = kernel(region("branch", 10, 40, 0, region("loop", 11, 39, 20, *chunks(600))))
LAST = region("branch", 36, 38, 500)  # of a block


def own_forward(*more):
    """Products before the inner loop as well, and what ends a block in it."""
    step = region("branch", 2, 50, 4, region("loop", 11, 39, 20, *chunks(*more), LAST), matmuls=2)
    return Schedule("toy", region("kernel", 0, 100, 9, region("loop", 1, 98, 3, step)))


@pytest.mark.parametrize(("queries", "keys"), [(512, 256), (256, 512), (512, 512)])
def test_steps_take_what_their_blocks_take(queries, keys):
    """Of 16 heads that share keys. A block counts if a query of it sees a key of it, needs no mask if all see all, is cheaper if its first
    half sees nothing, and for the forward pass as stairs if it is a square on the diagonal."""
    blocks = np.tril(np.ones((TOKENS, TOKENS), bool)).reshape(TOKENS // queries, queries, TOKENS // keys, keys)
    rows, columns, visited, whole = TOKENS // queries, TOKENS // keys, blocks.any((1, 3)).sum(), blocks.all((1, 3)).sum()
    later = visited - blocks[:, : queries // 2].any((1, 3)).sum()
    masked = 700 if queries == keys else 2000
    splash = list(attention.splash_visits(attention.sight(TOKENS, queries, keys), queries, keys, FORWARD, 2.0, 0))
    told = attention.forward_sight(TOKENS, queries, keys)
    schedule = own_forward(700, 800) if queries == keys else own_forward()
    forward = list(attention.forward_visits(told, queries, keys, schedule, 2.0, 0))
    gradient = list(attention.gradient_visits(attention.gradient_sight(TOKENS, queries, keys), queries, keys, GRADIENT, 2.0, 0))
    assert (len(splash), len(forward), len(gradient)) == (HEADS * rows * columns, HEADS, HEADS * rows)
    assert sum(visit.cycles for visit in splash) == HEADS * (rows * 1_100_000 + rows * columns * 7 + visited * 1000)
    assert sum(visit.cycles for visit in forward) == HEADS * (7 + rows * 500 + visited * 20 + whole * 1000 + (visited - whole) * masked)
    passes = visited * 20 + whole * 1000 + later * 600 + (visited - whole - later) * 2000
    assert sum(visit.cycles for visit in gradient) == 1_100_000 + HEADS * (rows * 7 + passes)
    for visits in (splash, forward, gradient):
        assert sum(visit.flops for visit in visits) == HEADS * visited * 500 * 2.0
    # Every query is read and every result written once, and no block of keys is loaded for a step that does not visit it.
    loads = [visit.inputs["k and v"][0] for visit in splash]
    assert sum(now != before for now, before in zip(loads[1:], loads[:-1], strict=True)) <= HEADS * visited
    assert {len(visit.inputs) for visit in attention.splash_visits(told, queries, keys, kernel(WAY, transfers=1), 2.0, 0)} == {1}
    for visits, most in ((splash, HEADS * rows), (forward, HEADS), (gradient, HEADS * rows)):
        assert len({visit.output[0] for visit in visits}) == most


def test_a_schedule_of_another_form_is_an_error():
    seen = attention.sight(TOKENS, 512, 256)
    with pytest.raises(ScheduleError, match="1 loops around 1 regions of products and 3 without, expected 1, 1 and 2"):
        list(attention.splash_visits(seen, 512, 256, kernel(region("branch", 6, 8, 1), WAY), 2.0, 0))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_work_is_what_the_timeline_counts(chip):
    for case in attention.cases(chip):
        launch = case.launch(chip)
        if "splash" not in case.name:
            (flops,) = re.findall(r"cost_estimate=CostEstimate\(flops=(\d+)", str(jax.make_jaxpr(launch.function)(*launch.arguments)))
            assert int(flops) == case.work.flops
            continue
        tokens = launch.arguments[0].shape[1]
        queries, keys = kernels._TILINGS[chip.name].forward[:2]
        table = f"s8[1,{tokens // queries},{tokens // keys}]{{2,1,0}}"
        heads = ", ".join(f"bf16[{x.shape[2]},{tokens},128]{{2,1,0}}" for x in launch.arguments[:3])
        call = f"custom-call(%a), operand_layout_constraints={{{table}, {table}, {heads}}}, backend_config={{}}"
        text = f"ENTRY %main (a: f32[]) -> f32[] {{\n  %a = f32[] parameter(0)\n  ROOT %splash_mha_fwd.1 = bf16[1] {call}\n}}"
        assert hlo_cost.product_flops(hlo.computations(text))[1] == case.work.flops
