"""A run is continued only by one that would have made the same batches and updates."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.train import PreparedCorpus, run_identity
from interns1pro_jax.checkpoint.manager import CheckpointError, CheckpointManager
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import PipelineConfig
from interns1pro_jax.optim.optimizer import OptimizerConfig

CORPUS = PreparedCorpus("data", PipelineConfig(RowSize(128, patches=32)))
MODEL = ModelConfig(TextConfig(vocab_size=64), None, None)
SMALLER = dataclasses.replace(CORPUS, pipeline=dataclasses.replace(CORPUS.pipeline, row=RowSize(64, patches=32)))
RUN = dict(model=MODEL, corpus=CORPUS, fingerprint="0", optimizer=OptimizerConfig(), seed=0)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("pipeline.row.tokens: saved 128, now 64", {"corpus": SMALLER}),
        ("largest_image", {"corpus": dataclasses.replace(CORPUS, largest_image=9216)}),
        ("optimizer.b2", {"optimizer": OptimizerConfig(b2=0.9)}),
        ("data", {"fingerprint": "1"}),
        ("seed", {"seed": 1}),
        ("model.text.vocab_size", {"model": ModelConfig(TextConfig(vocab_size=128), None, None)}),
    ],
)
def test_another_run_is_refused_and_the_key_is_named(tmp_path, mesh, key, change):
    state = {"x": jnp.zeros(2)}
    with CheckpointManager(tmp_path, run_identity(**RUN)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        assert checkpoints.restore(state).step == 1
    with CheckpointManager(tmp_path, run_identity(**{**RUN, **change})) as checkpoints, pytest.raises(CheckpointError, match=key):
        checkpoints.restore(state)


def test_where_and_how_much_is_evaluated_may_change():
    moved = dataclasses.replace(CORPUS, directory="elsewhere", evaluation_batches=1, samples=0)
    assert run_identity(**{**RUN, "corpus": moved}) == run_identity(**RUN)
