"""The experts' kernels equal their definition, in the emulator of `test_grouped_matmul`; and stand where they should."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import expert_mlp as module
from pallas_kernels.chips import CHIPS
from pallas_kernels.expert_mlp import expert_mlp, weighted_swiglu
from pallas_kernels.grouped_matmul import grouped_matmul_reference
from pallas_kernels.grouped_product import ProductTiling
from pallas_kernels.grouped_product import grouped_swiglu as kernel
from pallas_kernels.swiglu_gradient import block_rows, swiglu_gradient
from tests.kernels.test_grouped_matmul import COST, EMULATED, LIMIT, SIZES, no_races

M, K, F, D = 320, 128, 256, 384
ONE_PANEL = ProductTiling((16, 48, 80), 256, 1, 2, 2, 2, COST, LIMIT)
PANELS = ProductTiling((32, 64), 256, 2, 1, 3, 3, COST, LIMIT)


@functools.cache
def operands(dtype, rows: int = M, groups: int = 7):
    keys = jax.random.split(jax.random.key(0), 4)
    lhs, rhs = jax.random.normal(keys[0], (rows, K), dtype), jax.random.normal(keys[1], (groups, K, 2 * F), dtype) / 8
    return lhs, rhs, jax.random.uniform(keys[2], (rows,), jnp.float32), jax.random.normal(keys[3], (rows, F), dtype)


def reference(lhs, rhs, weights, sizes, **options):
    return weighted_swiglu(grouped_matmul_reference(lhs, rhs, sizes, **options), weights)


@functools.partial(jax.jit, static_argnames="tiling")
def fused(lhs, rhs, weights, sizes, tiling):
    return kernel(lhs, rhs, weights, sizes, jnp.int32(0), dtype=jnp.dtype(jnp.float32), tiling=tiling, interpret=EMULATED)


@pytest.mark.parametrize("name", ["uneven", "all rows in one group", "groups within a pack", "empty at both ends", "starts at 3"])
@pytest.mark.parametrize("tiling", [ONE_PANEL, PANELS], ids=["one panel", "panels"])
def test_kernel_equals_reference(tiling, name):
    lhs, rhs, weights, _ = operands(jnp.bfloat16)
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    wanted = reference(lhs, rhs, weights, sizes, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(fused(lhs, rhs, weights, sizes, tiling), wanted, rtol=1e-4, atol=1e-4)
    assert no_races()


def test_random_sizes_of_many_groups():
    rng = np.random.default_rng(0)
    lhs, rhs, weights, _ = operands(jnp.bfloat16, rows=403, groups=64)
    sizes = jnp.asarray(rng.multinomial(403, rng.dirichlet(np.full(64, 0.3))), jnp.int32)
    wanted = reference(lhs, rhs, weights, sizes, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(fused(lhs, rhs, weights, sizes, ONE_PANEL), wanted, rtol=1e-4, atol=1e-4)
    assert no_races()


def test_what_is_no_number_stays_in_its_group():
    lhs, rhs, weights, _ = operands(jnp.float32)
    sizes = jnp.asarray([37, 3, 60, 0, 100, 20, 100], jnp.int32)
    bad = slice(100, 200)  # group 4, whose packs the neighbours share
    out = np.asarray(fused(lhs.at[bad].set(jnp.nan), rhs, weights, sizes, ONE_PANEL))
    assert np.isnan(out[bad]).all() and np.isfinite(np.delete(out, np.r_[bad], 0)).all()


def whole(lhs, wi, wo, weights, sizes, *, transposed=False, **options):
    hidden = reference(lhs, wi, weights, sizes, **options)
    return grouped_matmul_reference(hidden, jnp.swapaxes(wo, 1, 2) if transposed else wo, sizes, **options)


@functools.cache
def down(dtype, transposed: bool, groups: int = 7):
    return jax.random.normal(jax.random.key(1), (groups, D, F) if transposed else (groups, F, D), dtype) / 20


@pytest.mark.parametrize(
    "chip, dtype, transposed",
    [("v5p", jnp.float32, True), ("tpu7x", jnp.bfloat16, False)],
    ids=["v5p transposed", "tpu7x bfloat16"],
)
def test_value_and_gradients_with_the_tiles_of_a_chip(chip, dtype, transposed, monkeypatch):
    monkeypatch.setattr(module._expert_mlp, "optimize_remat", False)  # it refuses the emulator's callbacks
    (lhs, wi, weights, _), wo = operands(dtype), down(dtype, transposed)
    grad = jax.random.normal(jax.random.key(2), (M, D), dtype)
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    run = functools.partial(expert_mlp, transposed=transposed, chip=CHIPS[chip], interpret=pltpu.InterpretParams())
    share = 2e-2 if dtype == jnp.bfloat16 else 1e-5  # of the largest element
    out = run(lhs, wi, wo, weights, sizes)  # nothing is kept: the fused kernel
    # In float32: the definition in bfloat16 is rounded at every step, the kernels' gradients only in the end.
    exact = [x.astype(jnp.float32) for x in (lhs, wi, wo, weights, grad)]
    wanted, reference_pullback = jax.vjp(lambda *args: whole(*args, sizes, transposed=transposed), *exact[:4])
    kept, pullback = jax.vjp(lambda *args: run(*args, sizes), lhs, wi, wo, weights)
    dtypes = (*(dtype,) * 5, jnp.float32)
    for got, expected, of in zip((out, kept, *pullback(grad)), (wanted, wanted, *reference_pullback(exact[4])), dtypes, strict=True):
        assert got.dtype == of
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0, atol=share * np.abs(expected).max())


def test_gradients_of_swiglu_in_several_blocks_of_rows():
    rows, columns = 1100, 128
    gate_up, weights, grad = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((rows, 2 * columns), rows, (rows, columns)))
    )
    assert 2 * block_rows(2 * columns, 4)[0] < rows  # the third block is partly filled
    got = swiglu_gradient(gate_up, weights, grad, interpret=EMULATED)
    hidden, pullback = jax.vjp(weighted_swiglu, gate_up, weights)
    for x, y in zip(got, (*pullback(grad), hidden), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert no_races()


@pytest.mark.parametrize("columns, dtype, has_limit", [(1536, jnp.bfloat16, False), (4096, jnp.float32, True)])
def test_wide_rows_take_more_than_the_default_vector_memory(columns, dtype, has_limit):
    gate_up, grad = (jax.ShapeDtypeStruct((1100, width), dtype) for width in (2 * columns, columns))
    text = jax.jit(swiglu_gradient).trace(gate_up, jnp.ones(1100), grad).lower(lowering_platforms=("tpu",)).as_text()
    limits = [int(size) for size in re.findall(r"scoped_memory_configs.*?size\\22: (\d+)", text)]
    rows, row_bytes = block_rows(2 * columns, jnp.dtype(dtype).itemsize)
    assert has_limit == bool(limits) and all(2 * rows * row_bytes < limit < 64 << 20 for limit in limits)


def test_part_of_a_stack_is_read_in_place():
    (lhs, wi, weights, _), wo = operands(jnp.float32), down(jnp.float32, False)
    sizes = jnp.asarray([200, 0, 120], jnp.int32)
    out = expert_mlp(lhs, wi, wo, weights, sizes, group_offset=2, chip=CHIPS["v6e"], interpret=pltpu.InterpretParams())
    np.testing.assert_allclose(out, whole(lhs, wi, wo, weights, sizes, group_offset=2), rtol=1e-4, atol=1e-4)


def kernels(function, *args) -> dict[str, int]:
    """How often each kernel occurs in the program for a TPU."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    names = ("grouped_swiglu", "grouped_product", "grouped_product_transposed", "grouped_outer", "swiglu_gradient")
    return {name: count for name in names if (count := text.count(f'kernel_name = "{name}"'))}


def test_is_fused_where_nothing_is_kept():
    (lhs, wi, weights, _), wo = operands(jnp.bfloat16), down(jnp.bfloat16, False)
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)

    def loss(lhs, wi, wo, weights):
        return expert_mlp(lhs, wi, wo, weights, sizes, chip=CHIPS["v6e"]).astype(jnp.float32).sum()

    gradients = {"grouped_product_transposed": 2, "grouped_outer": 2, "swiglu_gradient": 1}
    assert kernels(loss, lhs, wi, wo, weights) == {"grouped_swiglu": 1, "grouped_product": 1}
    kept = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    assert kernels(kept, lhs, wi, wo, weights) == {"grouped_product": 2} | gradients
    # The recomputation forms gate and up; its own product of the hidden rows nobody reads, and XLA drops it.
    recomputed = jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))
    assert kernels(recomputed, lhs, wi, wo, weights) == {"grouped_swiglu": 1, "grouped_product": 3} | gradients


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(wi=jnp.zeros((2, 128, 384))), ValueError, "two halves of a multiple of 128 columns each, got 384"),
        (dict(wo=jnp.zeros((2, 256, 128))), ValueError, "rows have 128 elements but matrices have 256 rows"),
        (dict(wo=jnp.zeros((2, 128, 128), jnp.bfloat16)), TypeError, "both be bfloat16 or both float32"),
        (dict(weights=jnp.zeros((7,))), ValueError, r"one weight for each of 8 rows, got shape \(7,\)"),
        (dict(weights=jnp.zeros((8, 1))), ValueError, r"one weight for each of 8 rows, got shape \(8, 1\)"),
        (dict(weights=jnp.zeros((8,), jnp.int32)), TypeError, "must be floating-point numbers, got int32"),
        (dict(sizes=jnp.array([4, 5])), ValueError, "must be rows that sum to M = 8"),
        (dict(chip=None), ValueError, "the current device is not a TPU"),
    ],
)
def test_misuse_is_an_error_while_tracing(change, error, message):
    arguments = dict(
        lhs=jnp.zeros((8, 128)),
        wi=jnp.zeros((2, 128, 256)),
        wo=jnp.zeros((2, 128, 128)),
        weights=jnp.zeros(8),
        sizes=jnp.array([4, 4]),
        chip=CHIPS["v5p"],
    )
    arguments |= change
    chip = arguments.pop("chip")
    with pytest.raises(error, match=message):
        expert_mlp(*arguments.values(), chip=chip)
