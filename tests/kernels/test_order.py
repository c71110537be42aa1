"""An order changes no number, and XLA does not see through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.order import after, all_after

FIRST = [0.0, -0.0, 1.5, -7e30, np.inf, -np.inf, np.nan, 1e-45]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_numbers_stay_what_they_are(dtype):
    numbers = jnp.array([0, 5, -3, 2**30])
    x = jnp.array([[-0.0, 1.25], [np.nan, -np.inf]], dtype) if dtype != "int32" else numbers.reshape(2, 2)
    bits = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    for value in FIRST:
        first = jnp.full((2, 3), value)
        np.testing.assert_array_equal(jax.jit(after)(numbers, first), numbers)
        for found in (jax.jit(all_after)(x, first), jax.jit(all_after)(x, first, numbers)):
            np.testing.assert_array_equal(*(jax.lax.bitcast_convert_type(y, bits) for y in (found, x)))
    assert all_after(x) is x


def test_gradients_pass_as_if_there_were_no_order():
    x, first = jnp.arange(6.0).reshape(2, 3), jnp.ones(4)
    gradients = jax.grad(lambda x, first: (all_after(x, first) ** 2).sum(), (0, 1))(x, first)
    np.testing.assert_array_equal(gradients[0], 2 * x)
    np.testing.assert_array_equal(gradients[1], jnp.zeros(4))


@pytest.mark.parametrize("order, first", [(after, ["sine"]), (all_after, ["sine", "cosine"])])
def test_the_second_depends_on_each_first_in_the_compiled_program(order, first):
    functions = {"sine": jnp.sin, "cosine": jnp.cos}

    def function(numbers, y):
        return order(numbers, *(functions[name](y) for name in first))

    text = jax.jit(function).lower(jnp.arange(4), jnp.ones(3)).compile().as_text()
    assert all(f" {name}(" in text for name in first)
