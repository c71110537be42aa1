"""Meshes and the table of dimensions; what cannot be is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError
from interns1pro_jax.sharding import make_mesh


def test_axes_and_their_order():
    mesh = make_mesh(fsdp=2, expert=4)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 1, "expert": 4}
    with jax.set_mesh(mesh):
        assert sharding.shards("batch") == 8 and sharding.axis_size("expert") == 4
        assert sharding.spec("expert", "expert_embed", None) == PartitionSpec(("expert",), ("fsdp",), None)
        placed = sharding.constrain(jnp.zeros((8, 4)), "batch", None)
        assert placed.addressable_shards[0].data.shape == (1, 4)


def test_each_expert_group_is_on_one_device():
    """With expert=8, shard g of the experts' first axis is group g, and lives on one device."""
    with jax.set_mesh(make_mesh(expert=8)):
        experts = sharding.constrain(jnp.arange(512), "expert")
        for shard in experts.addressable_shards:
            groups = set((np.asarray(shard.data) // 64).tolist())
            assert len(groups) == 1 and groups == {shard.index[0].start // 64}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(expert=16), r"expert=16 needs 16 devices, but 8 are available"),
        (dict(fsdp=0), "mesh sizes must be positive"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**sizes)


def test_devices_given_must_match():
    with pytest.raises(ConfigError, match="needs 4 devices, but 3 are available"):
        make_mesh(expert=4, devices=jax.devices()[:3])


def test_indivisible_dimensions_and_a_missing_mesh():
    with jax.set_mesh(make_mesh(fsdp=8)), pytest.raises(ConfigError, match=r"'embed' of size 12 .* does not divide over .* fsdp=8"):
        sharding.check_divisible("parameter", (12, 3), ("embed", None))
    with pytest.raises(ConfigError, match="no mesh is in force"):
        sharding.axis_size("expert")
    with pytest.raises(ConfigError, match="unknown logical dimensions"):
        sharding.spec("heads")
