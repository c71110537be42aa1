"""One of several processes: places its rows of a batch, and prints what the whole batch is then."""

import sys

import jax
import numpy as np

from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import local_rows, place_batch


def main(address: str, count: str, index: str) -> None:
    jax.distributed.initialize(address, int(count), int(index))
    rng = np.random.default_rng(0)
    whole = {"tokens": rng.integers(0, 100, (16, 6)), "patches": rng.normal(size=(16, 3, 2)).astype(np.float32)}
    with jax.set_mesh(make_mesh(fsdp=jax.device_count())):
        rows = local_rows(16)
        assert len(rows) == 16 // int(count), rows
        placed = place_batch({name: x[rows] for name, x in whole.items()}, rows, 16)
        for name, x in placed.items():
            for shard in x.addressable_shards:
                assert np.array_equal(shard.data, whole[name][shard.index]), name
        total = jax.jit(lambda batch: batch["tokens"].sum())(placed)
        assert int(total) == whole["tokens"].sum()
    print("rows", rows.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
