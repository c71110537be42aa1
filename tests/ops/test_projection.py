"""Products with a weight in parts are those with the whole weight, gradients too, and keep the parts where they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.ops.projection import gathered, project
from interns1pro_jax.sharding import make_mesh, spec


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, expert=4), dict(data=2, fsdp=2, expert=2), dict(context=2, expert=4)], ids=str)
def test_parts_of_a_weight_are_the_whole(sizes):
    generator = np.random.default_rng(0)
    x, weight = generator.normal(size=(8, 4, 16)).astype(np.float32), generator.normal(size=(16, 2, 3)).astype(np.float32)

    def value(whole, product, x, weight):
        copies = whole(weight)
        once, again = (product("btd,dnh->btnh", y, copies) for y in (x, 2 * x))
        return (jnp.sin(once) ** 2 + again).sum()

    expected, expected_grads = jax.value_and_grad(value, (2, 3))(lambda weight: weight, jnp.einsum, jnp.asarray(x), jnp.asarray(weight))
    with jax.set_mesh(make_mesh(**sizes)):
        arguments = [jax.device_put(a, spec(*dims)) for a, dims in ((x, ("batch", "sequence", None)), (weight, ("embed", None, None)))]
        whole = partial(gathered, "weight", dtype="float32")
        found, grads = jax.jit(jax.value_and_grad(value, (2, 3)), static_argnums=(0, 1))(whole, project, *arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for grad, expected_grad, argument in zip(grads, expected_grads, arguments, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)
        assert grad.sharding.spec == argument.sharding.spec
