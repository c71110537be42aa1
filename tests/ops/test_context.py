"""The order of tokens on devices that share rows: there and back, with equal causal work for all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from interns1pro_jax.config import ConfigError
from interns1pro_jax.ops import context
from interns1pro_jax.sharding import constrain, make_mesh

T = 16


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_there_and_back(ranks):
    with jax.set_mesh(make_mesh(context=ranks)):
        rows = constrain(jnp.arange(2 * T).reshape(2, T), None, "sequence")
        balanced = context.balance(rows)
        np.testing.assert_array_equal(context.reading_order(balanced), rows)
        gathered = jax.shard_map(context.all_gather, out_specs=P(None, None), check_vma=False)(balanced)
        np.testing.assert_array_equal(gathered, rows)
        indices = jax.shard_map(
            lambda x: jnp.broadcast_to(context.own_indices(x.shape[1]), x.shape), out_specs=P(None, "context"), check_vma=False
        )(balanced)
        np.testing.assert_array_equal(indices if ranks > 1 else rows[0] + 0 * rows, balanced - T * np.arange(2)[:, None])
        work = np.asarray(balanced)[0].reshape(ranks, -1).sum(1)
        assert ranks == 1 or np.ptp(work) == 0


def test_gradient_goes_back_the_same_way():
    with jax.set_mesh(make_mesh(context=4)):
        x = constrain(jnp.arange(float(T)).reshape(1, T), None, "sequence")
        weights = jnp.arange(float(T)) ** 2
        balanced = partial(jnp.multiply, context.balance(constrain(weights[None], None, "sequence")))
        gradient = jax.grad(lambda x: jnp.sum(balanced(context.balance(x))))(x)
        np.testing.assert_array_equal(gradient[0], weights)


def test_rows_that_do_not_divide_are_refused():
    with jax.set_mesh(make_mesh(context=4)), pytest.raises(ConfigError, match="rows of 12 tokens do not divide into 8 chunks"):
        context.balance(constrain(jnp.zeros((1, 12)), None, "sequence"))
