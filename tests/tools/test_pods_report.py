"""The committed figures of compiled recipes are those of the recipes as they are."""

import gin
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
        mesh, step, row = (gin.get_configurable(name)() for name in ("MeshConfig", "StepConfig", "RowSize"))
        batch, title = gin.query_parameter("PipelineConfig.batch_size"), gin.query_parameter("train.title")
    assert (report.title, report.topology, report.mesh) == (title, mesh.topology, mesh.sizes)
    assert (report.remat, report.moe_chunks, report.length, report.tokens) == (step.remat, step.moe_chunks, row.tokens, batch * row.tokens)
