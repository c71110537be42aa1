"""Loss and gradients of a small model on a mesh, in one process or in several.

    sharded_gradient.py FILE [PORT PROCESSES INDEX]

Eight CPU devices in all; process 0 writes the results to FILE.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.objective import loss_function
from tests.tiny import multimodal, multimodal_batch, text_only


def gradients(**mesh_sizes: int) -> list[np.ndarray]:
    """Loss and gradients of packed documents, whole, on every process."""
    batch = multimodal_batch(multimodal())
    tokens = np.minimum(batch.inputs.tokens, 89)
    batch = Batch(ModelInputs(tokens, batch.inputs.positions, batch.inputs.segment_ids), batch.labels)
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        graph, state = nnx.split(create_model(text_only()))
        compute = jax.jit(jax.value_and_grad(lambda s, b: loss_function(nnx.merge(graph, s), b, remat="full")[0], allow_int=True))
        leaves = jax.tree.leaves(compute(state, place_batch(batch)))
        return [np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in leaves]


if __name__ == "__main__":
    file, port, processes, index = sys.argv[1], *map(int, sys.argv[2:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={8 // processes}"
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    results = gradients(fsdp=2, context=2, expert=2)
    if index == 0:
        np.savez(Path(file), *results)
