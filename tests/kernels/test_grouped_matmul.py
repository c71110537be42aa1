"""The TPU kernels, emulated with their copies and semaphores, equal the definition for every way that rows can fall into groups.

The emulator fills memory with NaN before its first use, refuses accesses out of bounds, and looks for races between copies and
compute; so a row that is read before it arrived, or written twice, does not go unnoticed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as emulator
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from interns1pro_jax.sharding import make_mesh
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from pallas_kernels.grouped_outer import OuterTiling, grouped_outer
from pallas_kernels.grouped_product import ProductTiling, grouped_product
from pallas_kernels.row_blocks import BlockCost

EMULATED = pltpu.InterpretParams(detect_races=True)
COST = BlockCost(per_row=48.0, min_rows=16, overhead=100)
LIMIT = 60 << 20
# Tiles smaller than the matrices and than most groups.
PRODUCT = ProductTiling((16, 48, 80), 128, 1, 2, 2, 2, COST, LIMIT)
PANELS = ProductTiling((32, 64), 128, 2, 1, 3, 3, COST, LIMIT)
OUTER = OuterTiling(16, 5, 128, 1, 3, 2, 3, LIMIT)
OUTER_PANELS = OuterTiling(32, 2, 128, 2, 2, 3, 0, LIMIT)

M, K, N = 320, 256, 384
SIZES = {
    "uneven": [5, 0, 17, 1, 9, 0, 288],
    "all rows in one group": [0, 0, 320, 0, 0, 0, 0],
    "large groups": [130, 33, 96, 61, 0, 0, 0],
    "groups within a pack": [3, 4, 2, 300, 5, 5, 1],
    "empty at both ends": [0, 100, 0, 60, 160, 0, 0],
} | {f"starts at {offset}": [offset, 40, 0, 87, 7, 90, 96 - offset] for offset in range(16)}


@functools.cache
def operands(dtype, rows: int = M, groups: int = 7, columns: int = N):
    keys = jax.random.split(jax.random.key(0), 3)
    lhs, rhs = jax.random.normal(keys[0], (rows, K), dtype), jax.random.normal(keys[1], (groups, K, columns), dtype)
    return lhs, rhs, jax.random.normal(keys[2], (rows, columns), dtype)


@functools.partial(jax.jit, static_argnames=("tiling", "transposed"))
def product(lhs, rhs, sizes, tiling, transposed=False):
    rhs = jnp.swapaxes(rhs, 1, 2) if transposed else rhs
    return grouped_product(
        lhs, rhs, sizes, jnp.int32(0), transposed=transposed, dtype=jnp.dtype(jnp.float32), tiling=tiling, interpret=EMULATED
    )


@functools.partial(jax.jit, static_argnames="tiling")
def outer(lhs, rhs, sizes, tiling):
    return grouped_outer(lhs, rhs, sizes, dtype=jnp.dtype(jnp.float32), tiling=tiling, interpret=EMULATED)


def outer_reference(lhs, grad, sizes):
    ends = np.cumsum(sizes)
    lhs, grad = (np.asarray(x, np.float64) for x in (lhs, grad))
    return np.stack([lhs[end - size : end].T @ grad[end - size : end] for size, end in zip(sizes, ends, strict=True)])


def no_races() -> bool:
    return emulator.races is None or not emulator.races.races_found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_product_equals_reference(dtype, sizes):
    lhs, rhs, _ = operands(dtype)
    wanted = grouped_matmul_reference(lhs, rhs, jnp.asarray(sizes), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product(lhs, rhs, jnp.asarray(sizes, jnp.int32), PRODUCT), wanted, rtol=1e-5, atol=1e-4)
    assert no_races()


@pytest.mark.parametrize("name", ["uneven", "large groups", "starts at 3"])
@pytest.mark.parametrize("tiling", [PRODUCT, PANELS], ids=["one panel", "panels"])
def test_transposed_product_equals_reference(tiling, name):
    lhs, rhs, _ = operands(jnp.bfloat16, columns=512)
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    wanted = grouped_matmul_reference(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product(lhs, rhs, sizes, tiling, transposed=True), wanted, rtol=1e-5, atol=1e-4)
    assert no_races()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_weight_gradient_equals_reference(dtype, sizes):
    lhs, _, grad = operands(dtype)
    got = outer(lhs, grad, jnp.asarray(sizes, jnp.int32), OUTER)
    np.testing.assert_allclose(got, outer_reference(lhs, grad, sizes), rtol=1e-5, atol=1e-4)
    assert all((np.abs(got[group]).max() == 0) == (size == 0) for group, size in enumerate(sizes))
    assert no_races()


@pytest.mark.parametrize("name", ["uneven", "all rows in one group"])
def test_weight_gradient_in_panels(name):
    lhs, _, grad = operands(jnp.bfloat16, columns=512)
    got = outer(lhs, grad, jnp.asarray(SIZES[name], jnp.int32), OUTER_PANELS)
    np.testing.assert_allclose(got, outer_reference(lhs, grad, SIZES[name]), rtol=1e-5, atol=1e-4)


def test_random_sizes_of_many_groups():
    rng = np.random.default_rng(0)
    lhs, rhs, grad = operands(jnp.bfloat16, rows=1003, groups=64, columns=256)
    for concentration in (0.05, 0.3, 1.0, 30.0):
        sizes = rng.multinomial(1003, rng.dirichlet(np.full(64, concentration)))
        got = product(lhs, rhs, jnp.asarray(sizes, jnp.int32), PRODUCT)
        wanted = grouped_matmul_reference(lhs, rhs, jnp.asarray(sizes), preferred_element_type=jnp.float32)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
        got = outer(lhs, grad, jnp.asarray(sizes, jnp.int32), OUTER)
        np.testing.assert_allclose(got, outer_reference(lhs, grad, sizes), rtol=1e-5, atol=1e-4)
    assert no_races()


@pytest.mark.parametrize("sizes", [[37], [16], [1], [1, 0], [15, 1]], ids=str)
def test_few_rows(sizes):
    lhs, rhs, grad = operands(jnp.bfloat16, rows=sum(sizes), groups=len(sizes))
    wanted = grouped_matmul_reference(lhs, rhs, jnp.asarray(sizes), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product(lhs, rhs, jnp.asarray(sizes, jnp.int32), PRODUCT), wanted, rtol=1e-5, atol=1e-4)
    got = outer(lhs, grad, jnp.asarray(sizes, jnp.int32), OUTER)
    np.testing.assert_allclose(got, outer_reference(lhs, grad, sizes), rtol=1e-5, atol=1e-4)


def test_what_is_no_number_stays_in_its_group():
    lhs, rhs, grad = operands(jnp.float32)
    sizes = np.array([37, 3, 60, 0, 100, 20, 100])
    bad = slice(100, 200)  # group 4, whose packs the neighbours share
    lhs, grad = lhs.at[bad].set(jnp.nan), grad.at[bad].set(jnp.inf)
    out = np.asarray(product(lhs, rhs, jnp.asarray(sizes, jnp.int32), PRODUCT))
    assert np.isnan(out[bad]).all() and np.isfinite(np.delete(out, np.r_[bad], 0)).all()
    got = np.asarray(outer(lhs, grad, jnp.asarray(sizes, jnp.int32), OUTER))
    assert np.isnan(got[4]).all() and np.isfinite(np.delete(got, 4, 0)).all()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_value_and_gradients_with_the_tiles_of_a_chip(chip, dtype):
    lhs, rhs, grad = operands(dtype)
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    run = functools.partial(grouped_matmul, chip=chip, interpret=pltpu.InterpretParams())
    (out, pullback), (wanted, reference_pullback) = (
        jax.vjp(lambda x, w, f=f: f(x, w, sizes), lhs, rhs) for f in (run, grouped_matmul_reference)
    )
    tolerance = {"rtol": 2e-2, "atol": 0.3} if dtype == jnp.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    for got, expected in zip((out, *pullback(grad)), (wanted, *reference_pullback(grad)), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), **tolerance)


def test_transposed_matrices_give_the_same_value_and_gradients():
    lhs, rhs, grad = operands(jnp.float32)
    run = functools.partial(grouped_matmul, chip=CHIPS["v5p"], interpret=pltpu.InterpretParams(), transposed=True)
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    out, pullback = jax.vjp(lambda x, w: run(x, jnp.swapaxes(w, 1, 2), sizes), lhs, rhs)
    wanted, reference_pullback = jax.vjp(lambda x, w: grouped_matmul_reference(x, w, sizes), lhs, rhs)
    for got, expected in zip((out, *pullback(grad)), (wanted, *reference_pullback(grad)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_part_of_a_stack_is_read_in_place():
    lhs, rhs, grad = operands(jnp.float32)
    sizes, stack = jnp.asarray([200, 0, 120], jnp.int32), rhs
    run = functools.partial(grouped_matmul, chip=CHIPS["v6e"], interpret=pltpu.InterpretParams())
    out, pullback = jax.vjp(lambda w: run(lhs, w, sizes, group_offset=jnp.int32(2)), stack)
    wanted, reference = jax.vjp(lambda w: grouped_matmul_reference(lhs, w, sizes, group_offset=2), stack)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(pullback(grad)[0], reference(grad)[0], rtol=1e-4, atol=1e-3)


def test_on_a_mesh():
    """Inside shard_map with its check of what varies: each device has its own groups."""
    lhs, rhs, _ = operands(jnp.float32)
    mesh = make_mesh(expert=2, devices=jax.devices()[:2])
    sizes = jnp.asarray([[100, 0, 60], [1, 150, 9]], jnp.int32).reshape(-1)
    interpret = pltpu.InterpretParams()

    def local(x, w, sizes):
        return grouped_matmul(x, w, sizes, chip=CHIPS["v5p"], interpret=interpret)

    with jax.set_mesh(mesh):
        specs = (P("expert"), P("expert"), P("expert"))
        args = [jax.device_put(x, jax.NamedSharding(mesh, P("expert"))) for x in (lhs, rhs[:6], sizes)]
        got = jax.jit(jax.shard_map(local, in_specs=specs, out_specs=P("expert")))(*args)
    np.testing.assert_allclose(got, grouped_matmul_reference(lhs, rhs[:6], sizes), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(lhs=jnp.zeros((4, 2, 128))), ValueError, r"lhs_MK must have rank 2, got shape \(4, 2, 128\)"),
        (dict(lhs=jnp.zeros((8, 128), jnp.float16)), TypeError, "both be bfloat16 or both float32, got float16 and float32"),
        (dict(lhs=jnp.zeros((8, 256))), ValueError, "rows have 256 elements but matrices have 128 rows"),
        (dict(rhs=jnp.zeros((2, 128, 100))), ValueError, "N must be a multiple of 128, got 100"),
        (dict(sizes=jnp.array([4.0, 4.0])), TypeError, "group_sizes_G must be integers, got float32"),
        (dict(sizes=jnp.array([4, 4, 0])), ValueError, "3 groups but 2 matrices"),
        (dict(sizes=jnp.array([4, 5])), ValueError, r"must be rows that sum to M = 8, got \[4 5\] \(sum 9\)"),
        (dict(sizes=jnp.array([9, -1])), ValueError, "must be rows that sum to M = 8"),
        (dict(chip=None), ValueError, "the current device is not a TPU"),
    ],
)
def test_misuse_is_an_error_while_tracing(change, error, message):
    arguments = dict(lhs=jnp.zeros((8, 128)), rhs=jnp.zeros((2, 128, 128)), sizes=jnp.array([4, 4]), chip=CHIPS["v5p"]) | change
    chip = arguments.pop("chip")
    with pytest.raises(error, match=message):
        grouped_matmul(*arguments.values(), chip=chip)
