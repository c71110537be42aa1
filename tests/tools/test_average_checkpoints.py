"""The average of checkpoints is that of every weight."""

import dataclasses
import json

import jax
import numpy as np
from flax import nnx

from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.checkpoint.weights import read_weights
from interns1pro_jax.models.interns1pro import create_model
from tests.tiny import text_only
from tools import average_checkpoints


def test_average_of_two_of_three(tmp_path, mesh, capsys):
    config = text_only(num_hidden_layers=1)
    _, first = nnx.split(create_model(config))
    identity = {"model": json.loads(json.dumps(dataclasses.asdict(config)))}
    with CheckpointManager(tmp_path / "run", identity, keep_last=3) as manager:
        for step, factor in ((1, 100.0), (2, 1.0), (3, 2.0)):
            params, buffers = nnx.split_state(jax.tree.map(lambda x, factor=factor: factor * x, first), nnx.Param, ...)
            manager.save(step, {"params": params, "buffers": buffers}, {})
    assert average_checkpoints.main([str(tmp_path / "run"), str(tmp_path / "out"), "--last", "2"]) == 0
    found = nnx.split(read_weights(tmp_path / "out")[0])[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 1.5 * y, rtol=1e-6), found, first)
    assert average_checkpoints.main([str(tmp_path / "run"), str(tmp_path / "other"), "--steps", "2"]) == 1
    assert "[1, 2, 3], chosen are [2]" in capsys.readouterr().err
