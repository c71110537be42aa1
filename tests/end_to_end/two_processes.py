"""One of several processes: places its rows of a batch, and prints which ones they are and what it hears of the others."""

import sys

import jax
import numpy as np

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.processes import first_alone, gather
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
    assert gather({"rows": rows.tolist()})[1 - int(index)]["rows"] == sorted(set(range(16)) - set(rows.tolist()))
    first_alone(lambda: None)
    try:
        first_alone(fail)
    except CheckpointError as error:
        print("all hear of", error)
    print("rows", rows.tolist())


def fail() -> None:
    raise CheckpointError(f"no space on process {jax.process_index()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
