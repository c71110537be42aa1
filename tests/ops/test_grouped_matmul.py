"""The fast grouped products equal the dense oracle, values and gradients, for every way that rows can fall into groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import interns1pro_jax.ops.grouped_matmul as module
from interns1pro_jax.ops import blocked_matmul
from interns1pro_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference
from interns1pro_jax.sharding import make_mesh
from pallas_kernels.chips import CHIPS

K, N = 24, 40
SIZES = {
    "uneven": [5, 0, 17, 1, 9, 0],
    "one group": [37],
    "all rows in one group": [0, 0, 300, 0],
    "all in the last": [0, 0, 3],
    "larger than the largest block": [90, 6, 600, 7],
    "large groups": [130, 33, 96, 161],
    "fewer rows than groups": [0, 1, 0, 0, 0, 1, 0, 0, 0],
}


def arrays(sizes, extra_matrices=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    rows, groups = sum(sizes), len(sizes)
    lhs = jax.random.normal(keys[0], (rows, K)).astype(dtype)
    rhs = jax.random.normal(keys[1], (groups + extra_matrices, K, N))
    return lhs, rhs, jnp.asarray(sizes, jnp.int32), jax.random.normal(keys[2], (rows, N))


def value_and_gradients(product, lhs, rhs, sizes, grad, **options):
    def run(lhs, rhs, sizes, grad):
        out, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes, **options), lhs, rhs)
        return out, *pullback(grad.astype(out.dtype))

    return jax.jit(run)(lhs, rhs, sizes, grad)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_oracle(sizes):
    inputs = arrays(sizes)
    for got, wanted in zip(
        value_and_gradients(grouped_matmul, *inputs), value_and_gradients(grouped_matmul_reference, *inputs), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_transposed_matrices_give_the_same_value_and_gradients():
    lhs, rhs, sizes, grad = arrays(SIZES["uneven"])
    out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, jnp.swapaxes(rhs, 1, 2), sizes, transposed=True), lhs, rhs)
    wanted = value_and_gradients(grouped_matmul, lhs, rhs, sizes, grad)
    for got, expected in zip((out, *pullback(grad)), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_empty_groups_have_exactly_zero_gradient():
    *_, grad_rhs = value_and_gradients(grouped_matmul, *arrays(SIZES["uneven"]))
    for group, size in enumerate(SIZES["uneven"]):
        assert (np.abs(grad_rhs[group]).max() == 0) == (size == 0), group


@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(weight_dtype):
    lhs, rhs, sizes, grad = arrays(SIZES["large groups"], dtype=jnp.bfloat16)
    rhs = rhs.astype(weight_dtype)
    got = value_and_gradients(grouped_matmul, lhs, rhs, sizes, grad)
    wanted = value_and_gradients(grouped_matmul_reference, lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes, grad)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.bfloat16, weight_dtype]
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.05, atol=0.02 * float(jnp.abs(y).max()))


def test_preferred_element_type():
    lhs, rhs, sizes, _ = arrays([3, 4], dtype=jnp.bfloat16)
    assert grouped_matmul(lhs, rhs, sizes).dtype == jnp.bfloat16
    assert grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_offset_reads_a_layer_of_a_stack(dtype):
    lhs, stack, sizes, grad = arrays(SIZES["uneven"], extra_matrices=8)
    lhs, stack, offset = lhs.astype(dtype), stack.astype(dtype), 5
    got, grad_lhs, grad_stack = value_and_gradients(grouped_matmul, lhs, stack, sizes, grad, group_offset=jnp.int32(offset))
    own = stack[offset : offset + sizes.size]
    wanted, grad_lhs_wanted, grad_own = value_and_gradients(grouped_matmul, lhs, own, sizes, grad)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(grad_lhs, grad_lhs_wanted)
    np.testing.assert_array_equal(grad_stack[offset : offset + sizes.size], grad_own)
    assert not np.abs(grad_stack[:offset]).any() and not np.abs(grad_stack[offset + sizes.size :]).any()


def test_a_decoding_step_does_not_copy_the_stack():
    """The loops of a layer that is read in place hold no buffer of the size of all layers."""
    layers, experts = 16, 8
    lhs = jnp.ones((8, K))
    stack = jnp.ones((layers * experts, K, N))
    sizes = jnp.ones(experts, jnp.int32)
    program = jax.jit(lambda i: grouped_matmul(lhs, stack, sizes, group_offset=i * experts)).lower(jnp.int32(3)).compile()
    assert program.memory_analysis().temp_size_in_bytes < stack[0].nbytes * experts


def test_on_eight_devices():
    """Inside shard_map with replication checks: rows of each device over its own groups, matrices shared where they are equal."""
    lhs, rhs, sizes, grad = arrays([3, 0, 11, 2] * 8)
    rhs = rhs[:16]
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):

        def local(lhs, rhs, sizes):
            return grouped_matmul(lhs, rhs, sizes)

        everywhere = P(("fsdp", "expert"))
        product = jax.shard_map(local, in_specs=(everywhere, P("expert"), everywhere), out_specs=everywhere)

        def run(lhs, rhs, sizes, grad):
            out, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
            return out, *pullback(grad)

        put = jax.sharding.reshard
        got = jax.jit(run)(put(lhs, everywhere), put(rhs, P("expert")), put(sizes, everywhere), put(grad, everywhere))
        got = [np.asarray(x) for x in got]

    def whole(lhs, rhs, sizes):
        return grouped_matmul_reference(lhs, jnp.concatenate([rhs, rhs]), sizes)

    for x, y in zip(got, value_and_gradients(whole, lhs, rhs, sizes, grad), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_gpus_equal_oracle(sizes, transposed, monkeypatch):
    """With matrices before and behind those of the groups; blocks that are few at a time, and many."""
    monkeypatch.setattr(blocked_matmul, "BLOCK", 16)
    monkeypatch.setattr(blocked_matmul, "_TOGETHER", 4)
    lhs, rhs, sizes, grad = arrays(sizes, extra_matrices=3)

    def run(lhs, rhs, sizes, grad):
        given = jnp.swapaxes(rhs, 1, 2) if transposed else rhs
        options = dict(dtype=jnp.dtype("float32"))
        out = blocked_matmul.blocked_product(lhs, given, sizes, jnp.int32(2), transposed=transposed, **options)
        back = blocked_matmul.blocked_product(grad, given, sizes, jnp.int32(2), transposed=not transposed, **options)
        left, right = (grad, lhs) if transposed else (lhs, grad)
        matrices = blocked_matmul.blocked_weight_gradient(left, right, sizes, jnp.int32(2), num_matrices=len(rhs), **options)
        return out, back, jnp.swapaxes(matrices, 1, 2) if transposed else matrices

    used = slice(2, 2 + len(sizes))
    *wanted, matrices = value_and_gradients(grouped_matmul_reference, lhs, rhs[used], sizes, grad)
    wanted = *wanted, np.zeros(rhs.shape, np.float32)
    wanted[-1][used] = matrices
    for got, expected in zip(jax.jit(run)(lhs, rhs, sizes, grad), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_compiles_for_gpus_without_the_cpu_loops():
    """The platform is chosen where the program is lowered for, not where it is traced."""
    traced = jax.jit(lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes)).trace(*arrays(SIZES["large groups"])[:3])
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    assert f"x{blocked_matmul.BLOCK}x{K}x" in texts["cuda"] and f"x{blocked_matmul.BLOCK}x{K}x" not in texts["cpu"]


def test_toy_widths_go_through_the_tpu_kernels(monkeypatch):
    """On a TPU widths that are no multiples of 128 are padded; here the kernels are emulated."""
    kernels = functools.partial(module.tpu.grouped_matmul, interpret=pltpu.InterpretParams())
    inputs = arrays(SIZES["uneven"])
    wanted = value_and_gradients(grouped_matmul_reference, *inputs)
    monkeypatch.setattr(module, "current_chip", lambda: CHIPS["v5e"])
    monkeypatch.setattr(module.tpu, "grouped_matmul", kernels)
    for got, expected in zip(value_and_gradients(grouped_matmul, *inputs), wanted, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
