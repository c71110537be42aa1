"""Adapters: nothing changes at first, merged equals unmerged on any mesh, and only they are trained."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import ConfigError, LoraConfig
from interns1pro_jax.layers.lora import merged, trained_kind
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro, create_model
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.objective import loss_function
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import make_train_step
from tests.tiny import random_inputs, text_only

PLAIN = text_only(num_hidden_layers=1, num_experts=16)
CONFIG = dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, lora=LoraConfig(rank=4)))


def batch():
    inputs = random_inputs()
    return Batch(inputs, np.roll(inputs.tokens, -1, 1))


def test_a_step_trains_adapters_alone_and_merged_equals_unmerged():
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        optimizer = make_optimizer(OptimizerConfig(), constant(0.05), trained_kind(CONFIG))
        graph, state = init_state(create_model(CONFIG), optimizer)
        names = {str(path[-1]) for path, _ in nnx.to_flat_state(state.params)}
        assert names == {"a", "b", "wi_a_EDR", "wi_b_ERF", "wo_a_EFR", "wo_b_ERD"}
        base = jax.tree.map(np.asarray, state.buffers)
        loss = jax.jit(lambda model, batch: loss_function(model, batch)[1].loss)
        plain_graph = nnx.graphdef(nnx.eval_shape(lambda: InternS1Pro(PLAIN, rngs=nnx.Rngs(0))))
        at_first = float(loss(nnx.merge(plain_graph, *nnx.split_state(state.buffers, nnx.Param, ...)), place_batch(batch())))
        step = make_train_step(graph, CONFIG.text, optimizer)
        losses = []
        for _ in range(3):
            state, metrics = step(state, place_batch(batch()))
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(losses[0], at_first, rtol=1e-5)  # adapters change nothing before they are trained
        jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, state.buffers))
        params, buffers = nnx.split_state(state.buffers, nnx.Param, ...)
        plain, weights = merged(CONFIG, params, state.params)
        changed = [path for path, x in nnx.to_flat_state(weights) if not np.array_equal(x[...], dict(nnx.to_flat_state(params))[path][...])]
        assert {str(path[-1]) for path in changed} == {"q_DQH", "k_DKH", "v_DKH", "o_QHD", "wi_EDF", "wo_EFD"}
        assert plain == PLAIN
        model = nnx.merge(plain_graph, weights, buffers)
        np.testing.assert_allclose(
            loss(model, place_batch(batch())), loss(nnx.merge(graph, state.params, state.buffers), place_batch(batch())), rtol=1e-5
        )


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(attention=False, experts=False)])
def test_adapters_that_change_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"LoraConfig.{next(iter(wrong))}={next(iter(wrong.values()))}"):
        LoraConfig(**wrong)
