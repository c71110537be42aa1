"""Loss, logits, gradients and a training step do not depend on the mesh; towers included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.models.interns1pro import check_inputs, create_model
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.objective import loss_function
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import make_train_step
from tests.tiny import multimodal, multimodal_batch

CONFIG = multimodal()
MESHES = [dict(expert=8), dict(fsdp=2, expert=4), dict(context=4, expert=2), dict(fsdp=8), dict(data=2, context=2, expert=2)]


def run(mesh_sizes):
    """Loss, logits and all gradients as host arrays."""
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        graph, state = nnx.split(create_model(CONFIG))

        @jax.jit
        def compute(state, batch):
            def objective(state):
                return loss_function(nnx.merge(graph, state), batch, remat="full")[0]

            model = nnx.merge(graph, state)
            logits = model.text.logits(model(batch.inputs).hidden_BTD)
            return *jax.value_and_grad(objective, allow_int=True)(state), logits

        loss, gradient, logits = compute(state, place_batch(multimodal_batch(CONFIG)))
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(gradient)[0]]
        return float(loss), np.asarray(logits), dict(zip(names, map(np.asarray, jax.tree.leaves(gradient)), strict=True))


@pytest.fixture(scope="module")
def one_device():
    return run({})


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=str)
def test_eight_devices_equal_one(one_device, mesh_sizes):
    loss, logits, gradient = run(mesh_sizes)
    np.testing.assert_allclose(loss, one_device[0], rtol=1e-6)
    np.testing.assert_allclose(logits, one_device[1], atol=1e-5 * np.abs(one_device[1]).max())
    assert gradient.keys() == one_device[2].keys()
    for name, expected in one_device[2].items():
        np.testing.assert_allclose(gradient[name], expected, atol=1e-5 * max(np.abs(expected).max(), 1e-3), err_msg=name)


def test_every_parameter_learns(one_device):
    """All towers, the router and every expert layer get a gradient; the Fourier coefficients are not trained."""
    silent = [name for name, g in one_device[2].items() if not np.abs(g).max() > 0]
    assert all("position_ND" in name or "coef" in name for name in silent), silent


def test_towers_are_left_out_of_a_batch_without_media():
    """Towers of NaN would spoil the gradient, had they been run."""
    batch = multimodal_batch(CONFIG)
    empty = jax.tree.map(np.zeros_like, (batch.inputs.vision, batch.inputs.time_series))
    text = np.minimum(batch.inputs.tokens, 89)
    with jax.set_mesh(make_mesh(context=2, expert=2)):
        model = create_model(CONFIG)
        for tower in (model.vision, model.time_series):
            nnx.update(tower, jax.tree.map(lambda x: x * jnp.nan, nnx.state(tower)))
        graph, state = nnx.split(model)
        inputs = place_batch(dataclasses.replace(batch.inputs, tokens=text, vision=empty[0], time_series=empty[1]))
        objective = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state).embed(inputs) ** 2), allow_int=True)
        assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(jax.jit(objective)(state)))


def test_a_training_step_on_a_mesh_lowers_the_loss():
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        optimizer = make_optimizer(OptimizerConfig(), constant(3e-3))
        graph, state = init_state(create_model(CONFIG), optimizer)
        step, batch = make_train_step(graph, CONFIG.text, optimizer), place_batch(multimodal_batch(CONFIG))
        losses = []
        for _ in range(4):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 0.1 and int(state.step) == 4 and int(state.skipped) == 0
        assert metrics["router/load"].shape == (2, 32)
        np.testing.assert_allclose(np.asarray(metrics["router/load"]).reshape(2, 8, 4).sum(-1), 1, rtol=1e-5)
        assert (np.asarray(metrics["router/unselected_grad"]) > 0).all()


def test_mismatched_media_are_named():
    batch = multimodal_batch(CONFIG)
    check_inputs(CONFIG, batch.inputs)
    tokens = batch.inputs.tokens.copy()
    tokens[2, 0] = CONFIG.image_token_id
    with pytest.raises(ValueError, match="pack 2: the tokens have 5 image and video placeholders, but the contents give 4 embeddings"):
        check_inputs(CONFIG, dataclasses.replace(batch.inputs, tokens=tokens))
    with pytest.raises(ValueError, match="placeholders, but no time-series contents were given"):
        check_inputs(CONFIG, dataclasses.replace(batch.inputs, time_series=None))
    with pytest.raises(ValueError, match="the model has no vision tower"):
        check_inputs(dataclasses.replace(CONFIG, vision=None), batch.inputs)
