"""Both ways to look tokens up give the rows and their gradient, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax import sharding
from interns1pro_jax.ops.embedding import embed
from interns1pro_jax.sharding import make_mesh


def place(x, *dims):
    return sharding.constrain(jnp.asarray(x), *dims)


@pytest.mark.parametrize("mesh_sizes", [{}, dict(fsdp=2, context=2, expert=2)], ids=["one device", "eight devices"])
@pytest.mark.parametrize("vocabulary", [16, 512], ids=["more tokens than rows", "fewer"])
def test_rows_and_gradient(vocabulary, mesh_sizes):
    rng = np.random.default_rng(0)
    table, grad = (rng.normal(size=shape).astype(np.float32) for shape in ((vocabulary, 32), (8, 6, 32)))
    tokens = rng.integers(0, vocabulary, (8, 6))
    wanted = np.zeros_like(table)
    np.add.at(wanted, tokens, grad)
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        spec = sharding.spec("batch", "sequence", None)
        out, pullback = jax.vjp(lambda table: embed(table, place(tokens, "batch", "sequence"), jnp.float32), place(table, None, "embed"))
        np.testing.assert_array_equal(out, table[tokens])
        assert jax.typeof(out).sharding.spec == spec
        np.testing.assert_allclose(pullback(place(grad, "batch", "sequence", None))[0], wanted, rtol=1e-5, atol=1e-5)
