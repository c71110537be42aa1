"""A run is continued only by one that would have made the same batches and updates."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.train import run_identity
from interns1pro_jax.checkpoint.manager import CheckpointError, CheckpointManager
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.data.mixture import CurriculumStage, Source
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import ReadConfig
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.optim.batch_warmup import BatchWarmup
from interns1pro_jax.optim.optimizer import OptimizerConfig
from interns1pro_jax.train.objective import Objective

CORPUS = Corpus("tokenizer.json", [Source("text", 1.0)], PipelineConfig(RowSize(128, patches=32)))
MODEL = ModelConfig(TextConfig(vocab_size=64), None, None)
SMALLER = dataclasses.replace(CORPUS, pipeline=dataclasses.replace(CORPUS.pipeline, row=RowSize(64, patches=32)))
RUN = dict(
    model=MODEL, corpus=CORPUS, tokenizer="0", optimizer=OptimizerConfig(), objective=Objective(), batch_warmup=BatchWarmup(), seed=0
)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("pipeline.row.tokens: saved 128, now 64", {"corpus": SMALLER}),
        ("pipeline.window", {"corpus": dataclasses.replace(CORPUS, pipeline=dataclasses.replace(CORPUS.pipeline, window=4))}),
        ("objective.averaging", {"objective": Objective("square")}),
        ("optimizer.b2", {"optimizer": OptimizerConfig(b2=0.9)}),
        ("tokenizer", {"tokenizer": "1"}),
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


def test_where_the_data_is_and_how_it_is_read_evaluated_and_mixed_later_may_change():
    later = [CurriculumStage(10**6, {"text": 0.5})]
    moved = dataclasses.replace(
        CORPUS, directory="elsewhere", curriculum=later, reading=ReadConfig(threads=7), evaluation_batches=1, samples=0
    )
    assert run_identity(**{**RUN, "corpus": moved}) == run_identity(**RUN)
