"""The FP8 recipe: products and gradients are those of the quantised numbers, on every platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import interns1pro_jax.ops.fp8 as module
from interns1pro_jax.ops.fp8 import (
    grouped_matmul_fp8,
    grouped_matmul_fp8_reference,
    grouped_matmul_quantized,
    quantize_gradients,
    quantize_matrices,
)
from interns1pro_jax.ops.quantization import dequantize_activations, dequantize_blocks, quantize_activations, quantize_blocks
from interns1pro_jax.sharding import make_mesh
from pallas_kernels.chips import CHIPS

K, N = 200, 328  # the last tiles of 128 are partial
SIZES = {
    "uneven": [5, 0, 17, 1, 57, 0],
    "all rows in one group": [0, 0, 80, 0, 0, 0],
    "large groups": [0, 30, 50, 0, 0, 0],
    "one row each": [1, 1, 1, 1, 1, 75],
}


def arrays(sizes, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    rows, groups = sum(sizes), len(sizes)
    lhs = jax.random.normal(keys[0], (rows, K), dtype)
    return lhs, jax.random.normal(keys[1], (groups, K, N)), jnp.asarray(sizes), 1e-9 * jax.random.normal(keys[2], (rows, N), dtype)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(product, lhs, rhs, sizes, grad):
    out, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
    return out, *pullback(grad.astype(out.dtype))


def assert_same(got, wanted, rtol=2**-7):
    """Of the same dtypes, and equal up to the last bit of bfloat16: float32 sums in another order may round to either side."""
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_reference(sizes):
    inputs = arrays(sizes)
    got = value_and_gradients(grouped_matmul_fp8, *inputs)
    assert_same(got, value_and_gradients(grouped_matmul_fp8_reference, *inputs))
    for group, size in enumerate(sizes):
        assert (np.abs(got[2][group]).max() == 0) == (size == 0)


def test_gradients_are_products_of_the_quantised_numbers():
    lhs, rhs, sizes, grad = arrays(SIZES["large groups"])
    out, grad_lhs, grad_rhs = value_and_gradients(
        functools.partial(grouped_matmul_fp8, preferred_element_type=jnp.float32), lhs, rhs, sizes, grad
    )
    x, g = (np.asarray(dequantize_activations(*quantized)) for quantized in (quantize_activations(lhs), quantize_gradients(grad)))
    w = np.asarray(dequantize_blocks(*quantize_matrices(rhs)))
    for rows, group in ((slice(0, 30), 1), (slice(30, 80), 2)):
        assert_same((out[rows], grad_rhs[group]), (x[rows] @ w[group], x[rows].T @ g[rows]), rtol=1e-4)
        assert_same((grad_lhs[rows].astype(jnp.float32),), (g[rows] @ w[group].T,))


def test_float32_masters_and_their_bfloat16_export_give_the_same_bits():
    lhs, rhs, sizes, _ = arrays(SIZES["large groups"])
    np.testing.assert_array_equal(grouped_matmul_fp8(lhs, rhs, sizes), grouped_matmul_fp8(lhs, rhs.astype(jnp.bfloat16), sizes))
    # The other order differs, so the test can fail: amax or a value next to a boundary rounds to the other side.
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(quantize_blocks(rhs), quantize_matrices(rhs), strict=True))


def test_blocks_of_transposed_matrices_are_the_same():
    """So that one quantised copy serves the forward product and the input gradient."""
    _, rhs, *_ = arrays([3, 4])
    values, scale = quantize_matrices(rhs)
    for got, wanted in zip(quantize_matrices(rhs.swapaxes(1, 2)), (values.swapaxes(1, 2), scale.swapaxes(1, 2)), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))


def test_rows_that_are_not_finite_touch_no_other_row():
    lhs, rhs, sizes, _ = arrays(SIZES["large groups"])
    bad = lhs.at[7, 3].set(jnp.nan).at[40, 150].set(jnp.inf).at[41, 0].set(-jnp.inf)
    got, wanted = (np.asarray(grouped_matmul_fp8(x, rhs, sizes), np.float32) for x in (bad, lhs))
    rows = [7, 40, 41]
    assert np.isnan(got[rows]).all()
    np.testing.assert_array_equal(np.delete(got, rows, 0), np.delete(wanted, rows, 0))


def test_zeros_give_zeros():
    lhs, rhs, sizes, grad = arrays(SIZES["large groups"])
    for inputs in ((lhs * 0, rhs, sizes, grad), (lhs, rhs * 0, sizes, grad), (lhs, rhs, sizes, grad * 0)):
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in value_and_gradients(grouped_matmul_fp8, *inputs))
    assert not np.abs(grouped_matmul_fp8(lhs * 0, rhs, sizes)).any() and not np.abs(grouped_matmul_fp8(lhs, rhs * 0, sizes)).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_of_a_quantised_stack(transposed):
    _, rhs, _, _ = arrays(SIZES["uneven"])
    values, scale = quantize_matrices(rhs)
    used = jnp.asarray([40, 20])
    lhs, lhs_scale = quantize_activations(jax.random.normal(jax.random.key(1), (60, N if transposed else K)))
    got = grouped_matmul_quantized(lhs, lhs_scale, values, scale, used, group_offset=jnp.int32(3), transposed=transposed)
    own = grouped_matmul_quantized(lhs, lhs_scale, values[3:5], scale[3:5], used, transposed=transposed)
    np.testing.assert_array_equal(got, own)
    x, w = dequantize_activations(lhs, lhs_scale), dequantize_blocks(values[3], scale[3])
    assert_same((got[:40],), ((x[:40] @ (w.T if transposed else w)).astype(jnp.bfloat16),))


@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
def test_through_the_tpu_kernels(monkeypatch, chip):
    """On a TPU widths that are no multiples of 128 are padded; here the kernels are emulated."""
    inputs = arrays(SIZES["uneven"])
    wanted = value_and_gradients(grouped_matmul_fp8_reference, *inputs)
    monkeypatch.setattr(module, "current_chip", lambda: CHIPS[chip])
    monkeypatch.setattr(
        module.tpu, "grouped_matmul_fp8", functools.partial(module.tpu.grouped_matmul_fp8, interpret=pltpu.InterpretParams())
    )
    assert_same(value_and_gradients(grouped_matmul_fp8, *inputs), wanted)


def test_on_eight_devices():
    """Inside shard_map with replication checks: rows of each device over its own groups, matrices shared where they are equal."""
    lhs, rhs, sizes, grad = arrays([3, 0, 11, 2] * 8)
    rhs = rhs[:16]
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        everywhere, put = P(("fsdp", "expert")), jax.sharding.reshard
        product = jax.shard_map(grouped_matmul_fp8, in_specs=(everywhere, P("expert"), everywhere), out_specs=everywhere)
        inputs = (put(lhs, everywhere), put(rhs, P("expert")), put(sizes, everywhere), put(grad, everywhere))
        got = [np.asarray(x) for x in value_and_gradients(product, *inputs)]

    def whole(lhs, rhs, sizes):
        return grouped_matmul_fp8(lhs, jnp.concatenate([rhs, rhs]), sizes)

    assert_same(got, value_and_gradients(whole, lhs, rhs, sizes, grad))
