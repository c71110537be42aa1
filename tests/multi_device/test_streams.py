"""Streams: the rows of a device in two parts through every block equal all rows at once; values, gradients, routing, statistics, trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.layers.router import probes
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import constrain, join_rows, make_mesh, split_rows
from pallas_kernels.routing_reference import CHUNK
from tests.tiny import random_inputs, text_only

CONFIG = text_only(num_hidden_layers=3, mlp_only_layers=(1,))


@pytest.mark.parametrize("sizes, rows, chunks", [({}, 5, 2), (dict(fsdp=2, expert=2), 16, 4), (dict(fsdp=2, context=2), 8, 2)], ids=str)
def test_streams_equal_all_rows_at_once(sizes, rows, chunks):
    inputs = random_inputs(rows, CHUNK * sizes.get("context", 1))
    place = np.arange(inputs.tokens.shape[1]) - np.arange(rows)[:, None]
    documents = np.where(place < 50, 1, np.where(place < 120, 2, 0)).astype(np.int32)  # and padding
    inputs = dataclasses.replace(inputs, segment_ids=documents)

    @jax.jit(static_argnums=2)
    def gradients(model, probe_LR, chunks):
        def loss(model, probe_LR):
            out = model(inputs, probe_LR=probe_LR, remat="full", moe_chunks=chunks, trace=True)
            return (out.hidden_BTD.astype(jnp.float32) ** 2).mean() + 1e-3 * out.stats.z.sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(model, probe_LR)

    with jax.set_mesh(make_mesh(**sizes)):
        model, probe_LR = create_model(CONFIG), probes(2)
        (_, together), of_together = gradients(model, probe_LR, 1)
        (_, streams), of_streams = gradients(model, probe_LR, chunks)
        np.testing.assert_array_equal(streams.routing_LBTGC, together.routing_LBTGC)
        for found, wanted in ((streams, together), (of_streams, of_together)):
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1e-3, float(np.abs(b).max())))


def test_parts_of_rows_joined_are_the_rows():
    x = np.arange(48.0).reshape(2, 12, 2)
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        whole = constrain(jnp.asarray(x), None, "batch", None)
        parts = jax.jit(split_rows, static_argnums=(1, 2))(whole, (2, 1), 1)
        assert [part.shape[1] for part in parts] == [8, 4]
        np.testing.assert_array_equal(parts[1][0, :, 0], x[0, 2::3, 0])  # of three rows on each device, the last
        joined = jax.jit(join_rows, static_argnums=1)(parts, 1)
    np.testing.assert_array_equal(joined, x)
    assert joined.sharding.spec == whole.sharding.spec
