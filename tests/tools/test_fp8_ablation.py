"""Training with experts in FP8 is training: its loss falls as that of bfloat16 does."""

import dataclasses

import jax
import numpy as np
import pytest

from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from tests.tiny import random_inputs, text_only
from tools import fp8_ablation

STEPS = 20


@pytest.fixture(scope="module")
def losses():
    small = dataclasses.replace(fp8_ablation.TEXT, num_hidden_layers=1, num_experts=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_ablation, "TEXT", small)
        return {variant.name: fp8_ablation.train(variant, fp8_ablation.corpus(), 1, STEPS)[0] for variant in fp8_ablation.VARIANTS[:2]}


def test_the_recipe_learns_as_bfloat16_does(losses):
    exact, recipe = losses["bfloat16"], losses["the recipe"]
    assert exact.shape == (1, STEPS) and exact[0, -4:].mean() < exact[0, 0] - 1
    np.testing.assert_allclose(recipe, exact, rtol=0.02)
    assert not np.array_equal(recipe, exact)


@pytest.mark.parametrize("variant", fp8_ablation.VARIANTS[-2:], ids=lambda variant: variant.name)
def test_what_else_is_in_fp8_changes_the_forward_pass(variant):
    config = text_only()
    with jax.set_mesh(make_mesh()):
        model, inputs = create_model(config), random_inputs(rows=1)
        exact = jax.jit(lambda model: model(inputs).hidden_BTD)(model)
        with variant.around():
            rounded = jax.jit(lambda model: model(inputs).hidden_BTD)(model)
    assert 0 < np.abs(rounded - exact).max() < 10 * np.abs(exact).max()


def test_the_table_and_the_picture_have_every_variant(losses):
    content = {"losses": losses, "gradients": dict.fromkeys(losses, (0.5, 0.25)), "steps": STEPS, "date": "", "jax": "", "device": ""}
    late = {name: x[:, -5:].mean() for name, x in losses.items()}
    for line, (name, loss) in zip(fp8_ablation.table(content)[2:], late.items(), strict=False):
        assert line.startswith(f"| {name} | {loss:.4f} | {loss - late['bfloat16']:+.4f} |") and line.endswith("| 50.0 % | 25.0 % |")
    figure = fp8_ablation.draw(content)
    assert figure.axes[0].get_legend_handles_labels()[1] == list(losses)
