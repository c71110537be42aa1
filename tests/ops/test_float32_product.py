"""A float32 product of bfloat16 rows by parts is as exact as float32, and so is its matrix's gradient; that of the rows is rounded to
bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from interns1pro_jax.ops.float32_product import split_product

FORMULA = "btd,de->bte"


def test_parts_are_the_float32_product():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(2, 8, 256)), jnp.bfloat16)
    weight, grad = (generator.normal(size=shape).astype(np.float32) for shape in ((256, 32), (2, 8, 32)))
    found, pullback = jax.vjp(jax.jit(partial(split_product, FORMULA)), x, weight)
    exact = np.asarray(x, np.float64)
    # Rounding of float32 sums of 256 terms; parts of a bfloat16 alone would be off by 4e-3, two parts by 1e-5.
    np.testing.assert_allclose(found, np.einsum(FORMULA, exact, weight.astype(np.float64)), atol=3e-5, rtol=1e-6)
    grad_x, grad_weight = pullback(jnp.asarray(grad))
    np.testing.assert_allclose(grad_weight, np.einsum("btd,bte->de", exact, grad.astype(np.float64)), atol=5e-6, rtol=1e-6)
    assert grad_x.dtype == jnp.bfloat16
    wanted = np.einsum("bte,de->btd", grad.astype(np.float64), weight.astype(np.float64))
    np.testing.assert_allclose(grad_x.astype(np.float32), wanted, rtol=2**-8, atol=1e-4)
