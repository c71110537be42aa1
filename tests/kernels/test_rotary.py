"""Norm and rotary encoding of queries and keys in one kernel equal their definition, in the emulator of `test_grouped_matmul`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from interns1pro_jax import sharding
from interns1pro_jax.ops import rotary as ops
from interns1pro_jax.sharding import make_mesh
from pallas_kernels import rotary as module
from pallas_kernels.chips import CHIPS
from pallas_kernels.rotary import norm_and_rotary
from tests.kernels.test_grouped_matmul import EMULATED, no_races

B, T, Q, K, H, EPS = 2, 256, 4, 2, 128, 1e-6  # two chunks of a kernel's loop


@functools.cache
def operands(dtype, heads: int, batch: int = B):
    """Queries, keys, weights, tables, and gradients of the results; heads before tokens."""
    keys = jax.random.split(jax.random.key(0), 8)
    q, k, grad_q, grad_k = (jax.random.normal(key, (batch, n, T, H), dtype) for key, n in zip(keys, (Q, K, Q, K), strict=False))
    norms = (1 + 0.3 * jax.random.normal(key, (H,), jnp.float32) for key in keys[4:6])
    cos, sin = (jax.random.normal(key, (batch, heads, T, H), jnp.float32) for key in keys[6:])  # Fourier tables are no cosines
    return (q, 3 * k, *norms, cos, sin), (grad_q, grad_k)


def heads_second(*arrays):
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def value_and_gradients(function, operands, grads):
    """Results, and gradients of queries, keys and weights."""
    results, pullback = jax.vjp(lambda *trained: function(*trained, *operands[4:]), *operands[:4])
    return (*results, *pullback(grads))


def reference(operands, grads):
    """By the definition in float32, from numbers as the kernel has them."""
    dtype = operands[0].dtype
    q, k, *weights_and_tables = (x.astype(dtype).astype(jnp.float32) for x in operands)
    grads = tuple(x.astype(jnp.float32) for x in grads)

    def function(q, k, *rest):
        return heads_second(*ops.norm_and_rotary_reference(*heads_second(q, k), *rest, eps=EPS))

    return value_and_gradients(function, (q, k, *weights_and_tables), grads)


def assert_equal_but_for_one_rounding(got, wanted, dtypes):
    for x, expected, dtype in zip(got, wanted, dtypes, strict=True):
        assert x.dtype == dtype
        rtol = 1.01 * 2**-8 if dtype == jnp.bfloat16 else 2e-5
        np.testing.assert_allclose(x.astype(jnp.float32), expected, rtol=rtol, atol=rtol * 2e-2 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("heads, vmem", [(1, module._VMEM), (K, 0)], ids=["one table, whole rows", "tables of heads, blocks of rows"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_value_and_gradients_equal_reference(dtype, heads, vmem, monkeypatch):
    monkeypatch.setattr(module, "_VMEM", vmem)  # with none a block is a chunk
    values, grads = operands(dtype, heads)
    got = value_and_gradients(functools.partial(norm_and_rotary, eps=EPS, interpret=EMULATED), values, grads)
    assert_equal_but_for_one_rounding(got, reference(values, grads), (dtype,) * 4 + (jnp.float32,) * 2)
    assert no_races()


def test_on_a_mesh(monkeypatch):
    """Each device has its own rows and tokens; gradients of the weights are summed over all."""
    monkeypatch.setattr(ops, "current_chip", lambda: CHIPS["v5p"])
    monkeypatch.setattr(module, "norm_and_rotary", functools.partial(norm_and_rotary, interpret=pltpu.InterpretParams()))
    values, grads = operands(jnp.float32, K)
    q, k, q_norm, k_norm, cos, sin = values
    with jax.set_mesh(make_mesh(expert=2, context=2, devices=jax.devices()[:4])):
        q, k, *upstream = (sharding.constrain(x, "batch", "sequence", None, None) for x in heads_second(q, k, *grads))
        cos, sin = (sharding.constrain(x, "batch", None, "sequence", None) for x in (cos, sin))
        function = jax.jit(functools.partial(value_and_gradients, functools.partial(ops.norm_and_rotary, eps=EPS)))
        q, k, grad_q, grad_k, *grad_norms = function((q, k, q_norm, k_norm, cos, sin), tuple(upstream))
    wanted = reference(values, grads)
    assert_equal_but_for_one_rounding((*heads_second(q, k, grad_q, grad_k), *grad_norms), wanted, (jnp.float32,) * 6)


def test_rows_that_the_kernel_does_not_hold_take_the_definition(monkeypatch):
    monkeypatch.setattr(ops, "current_chip", lambda: CHIPS["v5p"])
    monkeypatch.setattr(module, "norm_and_rotary", functools.partial(norm_and_rotary, interpret=True))
    values, _ = operands(jnp.bfloat16, K)
    q, k = heads_second(*values[:2])
    text = {
        length: str(jax.make_jaxpr(functools.partial(ops.norm_and_rotary, eps=EPS))(
            q[:, :length], k[:, :length], *values[2:4], *(table[:, :, :length] for table in values[4:])
        ))
        for length in (T, 1, 100)
    }  # fmt: skip
    assert {length: "pallas_call" in found for length, found in text.items()} == {T: True, 1: False, 100: False}


def test_tables_get_no_gradient():
    values, _ = operands(jnp.float32, K)
    q, k = heads_second(*values[:2])

    def loss(q, cos, sin):
        return sum(x.sum() for x in ops.norm_and_rotary(q, k, *values[2:4], cos, sin, EPS))

    grad_q, *grad_tables = jax.grad(loss, argnums=(0, 1, 2))(q, *values[4:])
    assert jnp.abs(grad_q).max() > 0 and all(jnp.all(x == 0) for x in grad_tables)
