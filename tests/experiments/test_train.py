"""A run with all that can be measured switched on: what each part records is that of the batch it had."""

import json

import numpy as np
import pytest

from experiments.train import train
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.flops import Work
from interns1pro_jax.optim.batch_warmup import BatchWarmup
from interns1pro_jax.optim.optimizer import OptimizerConfig
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train.journal import read_journal
from interns1pro_jax.train.loop import LoopConfig
from interns1pro_jax.train.metrics import read_records
from interns1pro_jax.train.step import StepConfig
from tests.tiny import text_config


def test_a_growing_batch_with_noise_scale_work_and_a_trace(tmp_path, corpus):
    text = text_config(vocab_size=336, num_hidden_layers=1, num_experts=8)
    growth = 2 * corpus.pipeline.batch_size * corpus.pipeline.row.tokens  # after two updates
    train(
        tmp_path,
        model=ModelConfig(text, vision=None, time_series=None),
        mesh=MeshConfig(),
        corpus=corpus,
        optimizer=OptimizerConfig(),
        schedule=constant(1e-2),
        loop=LoopConfig(4, checkpoint_every=2, hang_seconds=600, profile_steps=(2, 2)),
        step=StepConfig(microbatches=2, noise_scale=True),
        batch_warmup=BatchWarmup([growth], [2]),
    )
    records = read_records(tmp_path)
    tokens = [record["tokens"] for record in records]
    assert min(tokens[2:]) > 1.5 * max(tokens[:2]) and records[-1]["tokens_seen"] == sum(tokens)
    for record in records:
        assert np.isfinite([record["loss"], record["noise/true_gradient_square"]]).all() and record["noise/gradient_variance"] > 0
    for record, rows in zip(records, (4, 4, 8, 8), strict=True):
        if "model_flops_per_second" in record:  # not where the clock began anew
            seconds = record["tokens"] / record["tokens_per_second"]
            flops = Work.of_step(text, 32, rows, "cpu", 1).flops
            assert record["model_flops_per_second"] * seconds == pytest.approx(flops, rel=1e-6)
    assert sum("model_flops_per_second" in record for record in records) >= 2
    report = (tmp_path / "report.md").read_text()
    for picture in ("loss", "router_health", "expert_load", "goodput", "optimizer"):
        assert f"({picture}.png)" in report and (tmp_path / f"{picture}.png").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    start = read_journal(tmp_path)[0]
    assert start["identity"]["batch_warmup"] == json.loads(json.dumps({"tokens": [growth], "factors": [2]}))
    assert start["environment"]["jax"] and start["data"] and "git" in start
