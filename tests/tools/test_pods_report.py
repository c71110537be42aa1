"""The committed figures of compiled recipes are those of the recipes as they are."""

import gin
import jax.numpy as jnp
import pytest

from interns1pro_jax.train.step_report import StepReport
from tests import recipes
from tools.pods_report import ROOT

FIGURES = sorted((ROOT / "docs" / "pods_report").glob("*.json"))
assert FIGURES, "the reports of compiled recipes are part of the repository"


@pytest.mark.parametrize("file", FIGURES, ids=lambda path: path.stem)
def test_figures_are_of_the_recipe(file):
    report = StepReport.from_json(file.read_text())
    with recipes.recipe(file.stem):
        mesh, step, row, text, optimizer = (
            gin.get_configurable(name)() for name in ("MeshConfig", "StepConfig", "RowSize", "TextConfig", "OptimizerConfig")
        )
        batch, title = gin.query_parameter("PipelineConfig.batch_size"), gin.query_parameter("train.title")
    assert (report.title, report.topology, report.mesh) == (title, mesh.topology, mesh.sizes)
    assert (report.remat, report.moe_chunks, report.length, report.tokens) == (step.remat, step.moe_chunks, row.tokens, batch * row.tokens)
    if not optimizer.freeze:  # moments are of what is trained
        numbers = report.memory.parameters / jnp.dtype(text.param_dtype).itemsize
        assert report.memory.optimizer == pytest.approx(2 * jnp.dtype(optimizer.moment_dtype).itemsize * numbers, rel=1e-3)


def test_nothing_large_is_summed_over_devices_in_every_layer():
    """Gradients are scattered. Of the output matrix's over 32 devices of tpu7x the compiler makes an all-reduce."""
    reports = {file.stem: StepReport.from_json(file.read_text()) for file in FIGURES}
    of_the_model = {name: report for name, report in reports.items() if report.devices >= 256}
    summed = {
        (name, row.bytes >> 20)
        for name, report in of_the_model.items()
        for row in report.collectives
        if row.kind == "all-reduce" and row.bytes >= 2**24 and row.count >= 94
    }
    assert summed == {("pretrain_tpu7x_128", 64)}
