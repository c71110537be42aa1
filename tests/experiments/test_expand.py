"""From a source to a grown checkpoint and on with training, as a user does it; what is missing is named before anything is written."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.expand import COUNTS, GROWN, expand
from experiments.train import _start_from as start_from
from experiments.train import train
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.weights import write_weights
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.expansion.assignment import ExpansionConfig
from interns1pro_jax.expansion.manifest import FILE, Manifest
from interns1pro_jax.expansion.routing_counts import RoutingCounts
from interns1pro_jax.families import RELEASED
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import MeshConfig, make_mesh
from interns1pro_jax.tokenizer.base import model_token_ids
from interns1pro_jax.tower_config import InternVitConfig
from interns1pro_jax.train.loop import LoopConfig
from interns1pro_jax.train.metrics import read_records
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import StepConfig
from tests.expansion.conftest import source_config
from tests.tiny import multimodal

EXPANSION = ExpansionConfig(growth=2, groups=4, experts_per_token=4)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """A run that continues compiles nothing again."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    for directory, seconds in ((str(tmp_path_factory.mktemp("cache")), 0), before):
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        if seconds == 0:
            yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Checkpoints of a run of a small model like Intern-S1: one router group, and the tower that sees tiles."""
    tower = InternVitConfig(
        depth=1, hidden_size=16, num_heads=2, intermediate_size=24, image_size=8, patch_size=4, out_hidden_size=32, initializer_range=0.2,
        dtype="float32", param_dtype="float32",
    )  # fmt: skip
    config = source_config("interns1", num_hidden_layers=1, mlp_only_layers=(), vocab_size=336, num_experts_per_tok=4)
    config = dataclasses.replace(config, vision=tower)
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with jax.set_mesh(make_mesh()):
        write_weights(directory, create_model(config), 7, "a test")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_runs_checkpoint_grows_trains_and_continues_and_its_manifest_repeats_it(tmp_path, run, corpus, capsys):
    expand(tmp_path / "grown", source=str(run), mesh=MeshConfig(), expansion=EXPANSION, corpus=corpus, calibration_batches=2)
    assert "the source's vision tower stays behind" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "grown" / GROWN / FILE)
    assert manifest.calibration is not None and manifest.calibration.tokens > 100
    (exported,) = (tmp_path / "grown").glob("source_*")
    assert isinstance(ModelConfig.from_hf(exported).vision, InternVitConfig)
    (exported / FILE).write_text("{}")  # a file of the source that is not carried along
    again = dict(source=str(exported), mesh=MeshConfig(), expansion=ExpansionConfig(method="copy"))
    expand(tmp_path / "again", manifest=str(tmp_path / "grown" / GROWN / FILE), **again)
    assert contents(tmp_path / "again" / GROWN) == contents(tmp_path / "grown" / GROWN)

    config = ModelConfig.from_hf(tmp_path / "grown" / GROWN)
    assert config.family == RELEASED and config.vision is None and config.text.router_n_groups == 4
    options: dict[str, Any] = dict(
        model=config, mesh=MeshConfig(), corpus=corpus, optimizer=OptimizerConfig(), schedule=constant(1e-2), step=StepConfig(),
        weights=str(tmp_path / "grown" / GROWN),
    )  # fmt: skip
    train(tmp_path / "trained", loop=LoopConfig(4), **options)
    shutil.rmtree(tmp_path / "grown" / GROWN)  # a run that has begun needs its checkpoint alone
    train(tmp_path / "trained", loop=LoopConfig(6), **options)
    records = read_records(tmp_path / "trained")
    losses = [record["loss"] for record in records]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(losses).all() and max(losses[4:]) < losses[0]
    options["weights"] = str(tmp_path / "again" / GROWN)
    with pytest.raises(ConfigError, match=r"of another model \(text.rope_theta: 10000.0 there, 1000.0 here"):
        other = dataclasses.replace(config, text=dataclasses.replace(config.text, rope_theta=1000.0))
        train(tmp_path / "other", loop=LoopConfig(1), **options | dict(model=other))


def test_what_is_missing_is_named_before_anything_is_written(tmp_path, run, corpus):
    workdir, given = tmp_path / "w", dict(source=str(run), mesh=MeshConfig())
    workdir.mkdir()
    for change, error, message in (
        (dict(expansion=EXPANSION), ConfigError, "method pairs needs a calibration set: bind expand.corpus"),
        (
            dict(expansion=ExpansionConfig(growth=3, groups=16, method="copy")),
            ConfigError,
            r"growth \* experts = 3 \* 8=24 must be divisible",
        ),
        (dict(expansion=EXPANSION, manifest=str(tmp_path / FILE)), ConfigError, f"{tmp_path / FILE} does not exist"),
        (dict(expansion=EXPANSION, source=str(tmp_path / "x"), corpus=corpus), CheckpointError, "x has no checkpoint"),
        (dict(expansion=EXPANSION, corpus=corpus, calibration_batches=0), ConfigError, "calibration_batches=0 must be positive"),
        (dict(expansion=EXPANSION, corpus=corpus, compile_only=True), ConfigError, "no step to compile"),
    ):
        with pytest.raises(error, match=message):
            expand(workdir, **given | change)
        assert not list(workdir.iterdir())
    counts = RoutingCounts(np.ones((1, 8, 4), int), np.ones((1, 8, 8), int), 1)
    counts.save(workdir / COUNTS, "another")
    with pytest.raises(CheckpointError, match="measured with another checkpoint"):
        RoutingCounts.load(workdir / COUNTS, "this", 1)
    with pytest.raises(
        CheckpointError, match="pairs among the best 1 experts of a token, but this growth and these groups need those among 2"
    ):
        RoutingCounts.load(workdir / COUNTS, "another", 2)
    (workdir / COUNTS).write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match="holds no routing counts"):
        expand(workdir, expansion=EXPANSION, **given)


def test_a_run_begins_with_the_weights_of_one_without_its_tower(tmp_path, corpus):
    whole = dataclasses.replace(multimodal(), time_series=None)
    whole = dataclasses.replace(whole, text=dataclasses.replace(whole.text, vocab_size=336))
    ids: dict[str, Any] = {**model_token_ids(corpus.load_tokenizer())}
    blind = dataclasses.replace(whole, vision=None, **ids)
    with jax.set_mesh(make_mesh()):
        stored = create_model(blind, 5)
        write_weights(tmp_path / "blind", stored)
        _, state = init_state(create_model(whole), make_optimizer(OptimizerConfig(), constant(1e-3)))
        other = dataclasses.replace(whole, text=dataclasses.replace(whole.text, rope_theta=1.0))
        with pytest.raises(ConfigError, match=r"of another model \(text\.rope_theta"):
            start_from(state, tmp_path / "blind", other)
        vision = jax.tree.map(np.asarray, state.params["vision"])
        begun = start_from(state, tmp_path / "blind", whole)
        assert not any(x.is_deleted() for x in jax.tree.leaves(begun))
        jax.tree.map(np.testing.assert_array_equal, begun.params["vision"], vision)
        np.testing.assert_array_equal(begun.params["text"]["embed_VD"][...], stored.text.embed_VD[...])
