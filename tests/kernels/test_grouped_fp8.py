"""The FP8 kernel, emulated with its copies and semaphores, equals its definition bit for bit where sums are exact."""

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
from pallas_kernels.grouped_fp8 import E4M3, dequantize, grouped_matmul_fp8, grouped_matmul_fp8_reference
from pallas_kernels.row_blocks import BlockCost
from pallas_kernels.scaled_product import ScaledTiling, scaled_product
from pallas_kernels.tiling import DoesNotFit, scaled_tiling

EMULATED = pltpu.InterpretParams(detect_races=True)
COST = BlockCost(per_row=48.0, min_rows=16, overhead=100)
# Tiles smaller than the matrices and than most groups; e4m3 as the chips know it, and scaled as they can.
TILINGS = {
    name: ScaledTiling((32, 64, 96), 128, panels, 2 + native, 2, 2, native, jnp.dtype(vectors), COST, 60 << 20)
    for name, panels, native, vectors in (("v5p", 3, False, "float32"), ("v6e", 1, False, "bfloat16"), ("tpu7x", 1, True, "bfloat16"))
}
M, K, N = 320, 256, 384
SIZES = {
    "uneven": [5, 0, 17, 1, 9, 0, 288],
    "all rows in one group": [0, 0, 320, 0, 0, 0, 0],
    "large groups": [130, 33, 96, 61, 0, 0, 0],
    "groups within a pack": [3, 4, 2, 300, 5, 5, 1],
    "empty at both ends": [0, 100, 0, 60, 160, 0, 0],
} | {f"starts at {offset}": [offset, 40, 0, 87, 7, 90, 96 - offset] for offset in (1, 15, 16, 31)}


@functools.cache
def operands(rows: int = M, groups: int = 7, depth: int = K, columns: int = N):
    """Small integers with scales of 1/4 to 4: every sum is exact in float32, in any order."""
    random = np.random.default_rng(0)

    def quantized(*shape, block):
        values = random.integers(-8, 9, shape).astype(np.float32)
        scale = 2.0 ** random.integers(-2, 3, (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1]))
        return jnp.asarray(values, E4M3), jnp.asarray(scale, jnp.float32)

    return *quantized(rows, depth, block=(1, 128)), *quantized(groups, depth, columns, block=(128, 128))


@functools.partial(jax.jit, static_argnames=("tiling", "transposed"))
def product(lhs, lhs_scale, rhs, rhs_scale, sizes, tiling, transposed=False):
    if transposed:
        rhs, rhs_scale = rhs.swapaxes(1, 2), rhs_scale.swapaxes(1, 2)
    dtype = jnp.dtype(jnp.float32)
    return scaled_product(
        lhs, lhs_scale, rhs, rhs_scale, sizes, jnp.int32(0), transposed=transposed, dtype=dtype, tiling=tiling, interpret=EMULATED
    )


def assert_equals_reference(operands, sizes, tiling, transposed=False):
    sizes = jnp.asarray(sizes, jnp.int32)
    wanted = grouped_matmul_fp8_reference(*operands, sizes, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(product(*operands, sizes, tiling, transposed), wanted)
    assert emulator.races is None or not emulator.races.races_found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_equals_reference(tiling, sizes):
    assert_equals_reference(operands(), sizes, tiling)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_transposed_equals_reference(tiling):
    assert_equals_reference(operands(), SIZES["uneven"], tiling, transposed=True)


def test_random_sizes_of_many_groups():
    random = np.random.default_rng(0)
    for concentration in (0.05, 1.0, 30.0):
        sizes = random.multinomial(1003, random.dirichlet(np.full(64, concentration)))
        assert_equals_reference(operands(1003, 64, 128, 128), sizes, TILINGS["v6e"])


@pytest.mark.parametrize("sizes", [[37], [32], [1], [1, 0], [31, 1]], ids=str)
def test_few_rows(sizes):
    assert_equals_reference(operands(sum(sizes), len(sizes)), sizes, TILINGS["tpu7x"])


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_every_number_is_exact_in_rows_and_matrices(tiling):
    """Also the smallest, which are no normal numbers of e4m3, and minus zero, whose bits are no number in the format of older chips."""
    bits = np.arange(256, dtype=np.uint8)
    bits[np.isnan(bits.view(E4M3).astype(np.float32))] = 0
    numbers = jnp.asarray(np.resize(bits, (384, 384)).view(E4M3))
    unit, ones = jnp.eye(384, dtype=E4M3), jnp.ones((384, 3), jnp.float32)
    sizes = jnp.array([384], jnp.int32)
    for scale in (2.0**-117, 1.0, 2.0**119):
        scales = scale * ones
        wanted = numbers.astype(jnp.float32) * scale
        np.testing.assert_array_equal(product(numbers, scales, unit[None], ones[None, :3], sizes, tiling), wanted)
        np.testing.assert_array_equal(product(unit, ones, numbers[None], scales[None, :3], sizes, tiling), wanted)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_what_is_no_number_stays_in_its_row_and_its_block(tiling):
    lhs, lhs_scale, rhs, rhs_scale = operands()
    sizes = jnp.asarray([37, 3, 60, 0, 100, 20, 100])
    wanted = product(lhs, lhs_scale, rhs, rhs_scale, sizes, tiling)
    got = product(lhs, lhs_scale.at[38, 1].set(jnp.nan), rhs, rhs_scale.at[4, 0, 2].set(jnp.nan), sizes, tiling)
    bad = np.zeros((M, N), bool)
    bad[38], bad[100:200, 256:] = True, True
    np.testing.assert_array_equal(got, jnp.where(bad, jnp.nan, wanted))


def test_part_of_a_stack_is_read_in_place():
    lhs, lhs_scale, rhs, rhs_scale = operands()
    sizes, offset = jnp.asarray([200, 0, 120]), jnp.int32(2)
    got = grouped_matmul_fp8(
        lhs, lhs_scale, rhs, rhs_scale, sizes, group_offset=offset, chip=CHIPS["v6e"], interpret=pltpu.InterpretParams()
    )
    wanted = grouped_matmul_fp8_reference(lhs, lhs_scale, rhs[2:5], rhs_scale[2:5], sizes)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wanted)


def test_on_a_mesh():
    """Inside shard_map with its check of what varies: each device has its own groups."""
    lhs, lhs_scale, rhs, rhs_scale = operands()
    arguments = (lhs, lhs_scale, rhs[:6], rhs_scale[:6], jnp.asarray([100, 0, 60, 1, 150, 9], jnp.int32))
    with jax.set_mesh(make_mesh(expert=2, devices=jax.devices()[:2])):
        run = functools.partial(grouped_matmul_fp8, chip=CHIPS["v5p"], interpret=pltpu.InterpretParams())
        local = jax.jit(jax.shard_map(run, in_specs=(P("expert"),) * 5, out_specs=P("expert")))
        got = local(*(jax.sharding.reshard(x, P("expert")) for x in arguments))
    np.testing.assert_array_equal(got, grouped_matmul_fp8_reference(*arguments))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("rows", [64, 8192, 65536])
def test_tiles_fit_the_vector_memory(chip, rows):
    for depth, columns, transposed in ((4096, 3072, False), (1536, 4096, False), (3072, 4096, True), (4096, 1536, True)):
        tiling = scaled_tiling(chip, rows, depth, columns, 64, 2, transposed=transposed)
        block, panel = max(tiling.block_rows), columns // tiling.panels
        rings = tiling.matrices * depth * panel + (tiling.read_ahead + 1) * block * (depth + 512) + tiling.results * block * panel * 2
        assert rings + 2 * block * depth < tiling.vmem_limit < chip.vmem
        assert tiling.panels % chip.cores == 0 and panel % tiling.columns == 0
    with pytest.raises(DoesNotFit, match="split the contraction"):
        scaled_tiling(chip, rows, 1 << 20, 4096, 64, 2, transposed=False)


def test_dequantized_numbers_are_those_of_the_definition():
    values, scale = operands()[2:]
    wanted = np.asarray(values, np.float32) * np.kron(np.asarray(scale), np.ones((1, 128, 128), np.float32))
    np.testing.assert_array_equal(dequantize(values, scale, (128, 128)).astype(jnp.float32), wanted)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(lhs=jnp.zeros((4, 2, 128), E4M3)), ValueError, r"lhs_MK must have rank 2, got shape \(4, 2, 128\)"),
        (
            dict(lhs=jnp.zeros((8, 256), jnp.bfloat16)),
            TypeError,
            "lhs must be float8_e4m3fn with float32 scales, got bfloat16 with float32",
        ),
        (dict(rhs_scale=jnp.ones((2, 2, 1), jnp.bfloat16)), TypeError, "rhs must be .*, got float8_e4m3fn with bfloat16"),
        (dict(lhs_scale=jnp.ones((8, 1))), ValueError, r"lhs_scale must .* shape \(8, 2\), got \(8, 1\)"),
        (dict(rhs_scale=jnp.ones((2, 1, 2))), ValueError, r"rhs_scale must .* shape \(2, 2, 1\), got \(2, 1, 2\)"),
        (dict(rhs_scale=jnp.full((2, 2, 1), 0.3)), ValueError, r"rhs_scale must be powers of two .*0.3.* and 3 more"),
        (dict(lhs_scale=jnp.full((8, 2), 2.0**-118)), ValueError, "lhs_scale must be powers of two from 2"),
        (dict(lhs=jnp.zeros((8, 128), E4M3)), ValueError, "rows have 128 elements but matrices have 256 rows"),
        (dict(rhs=jnp.zeros((2, 256, 100), E4M3)), ValueError, "N must be a multiple of 128, got 100"),
        (dict(sizes=jnp.array([4.0, 4.0])), TypeError, "group_sizes_G must be integers, got float32"),
        (dict(sizes=jnp.array([4, 4, 0])), ValueError, "3 groups but 2 matrices"),
        (dict(sizes=jnp.array([4, 5])), ValueError, r"must be rows that sum to M = 8, got \[4 5\] \(sum 9\)"),
        (dict(transposed=True), ValueError, "rows have 256 elements but matrices have 128 rows"),
        (dict(chip=None), ValueError, "the current device is not a TPU"),
    ],
)
def test_misuse_is_an_error_while_tracing(change, error, message):
    arguments = dict(
        lhs=jnp.zeros((8, 256), E4M3), lhs_scale=jnp.ones((8, 2)), rhs=jnp.zeros((2, 256, 128), E4M3), rhs_scale=jnp.ones((2, 2, 1)),
        sizes=jnp.array([4, 4]), chip=CHIPS["v5p"], transposed=False,
    ) | change  # fmt: skip
    options = {name: arguments.pop(name) for name in ("chip", "transposed")}
    with pytest.raises(error, match=message):
        grouped_matmul_fp8(*arguments.values(), **options)
