"""Batches on their way to the devices: never far ahead of the loop, and split over the mesh as the whole would be."""

import time

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import Feed, local_rows, place_batch
from tests.train.arithmetic import Numbers

pytestmark = pytest.mark.usefixtures("mesh")


def test_the_feed_is_never_far_ahead_and_ends_with_its_loop():
    batches = Numbers()
    with Feed(batches, range(100), depth=2) as feed:
        for step, host, device in feed:
            assert host["x"][0, 0] == device["x"][0, 0] == step
            time.sleep(0.02)
            assert batches.asked[-1] <= step + 4
            if step == 5:
                break
    assert batches.asked[-1] < 12


@pytest.mark.parametrize("devices", [1, 8])
def test_a_part_of_a_batch_is_placed_as_the_whole_would_be(devices):
    with jax.set_mesh(make_mesh(fsdp=devices)):
        assert local_rows(16).tolist() == list(range(16))
        batch = {"x": np.arange(32).reshape(16, 2), "y": np.float32(3)}
        rows = np.arange(16)
        whole, part = place_batch(batch), place_batch(batch, rows, 16)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.sharding == b.sharding, whole, part))
        with pytest.raises(ConfigError if devices == 8 else IndexError):
            place_batch({"x": batch["x"][:4]}, rows[:4], 12 if devices == 8 else 16)


def test_batches_are_split_over_the_mesh():
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(16, 2), "scale": np.float32(2)}
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        placed = place_batch(batch)
        assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 2)}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
        with pytest.raises(ConfigError, match="size 12"):
            place_batch({"x": np.zeros((12, 2))})
