"""Choices of how a step is computed change neither its loss nor its gradients; updates of bfloat16 parameters are not lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from interns1pro_jax.config import ConfigError, RouterConfig
from interns1pro_jax.layers.router import RouterStats
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.optim.optimizer import Optimizer, OptimizerConfig, make_optimizer, stochastic_round
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.objective import MEAN_OVER_TOKENS, Counts, Objective, auxiliary_loss, loss_function
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import StepConfig, make_train_step
from pallas_kernels.routing_reference import CHUNK
from tests.tiny import multimodal, multimodal_batch, text_config, text_only

BY_ROW = RouterConfig(balance_coef=0.1, balance_over="row", z_coef=0.01)
# Its update is the gradient, so much enlarged that subtracting it from the parameter rounds little of it away.
RATE = 1024.0
DESCENT = Optimizer(optax.identity(), constant(RATE))


def packed_batch(length: int = 24) -> Batch:
    """Eight rows of two documents and padding."""
    batch = multimodal_batch(multimodal(), length=length)
    tokens = np.minimum(batch.inputs.tokens, 89)
    return Batch(ModelInputs(tokens, batch.inputs.positions, batch.inputs.segment_ids), batch.labels)


def gradients(config, batch, mesh=None, objective=MEAN_OVER_TOKENS, **options):
    """Metrics and all gradients of one step, as host arrays."""
    mesh = mesh or dict(fsdp=2, context=1 if batch.inputs.vision else 2)
    with jax.set_mesh(make_mesh(**mesh)):
        graph, state = init_state(create_model(config), DESCENT)
        before = jax.tree.map(np.asarray, state.params)
        after, metrics = make_train_step(graph, config.text, DESCENT, StepConfig(**options), objective=objective)(state, place_batch(batch))
        return jax.tree.map(np.asarray, metrics), jax.tree.map(lambda a, b: (a - np.asarray(b)) / RATE, before, after.params)


def assert_equal(got, wanted, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(np.abs(y).max(), 1e-3))


def test_accumulated_equals_the_whole_batch():
    """Rows with different numbers of labels, tokens, images and signals, so that a mean of means would differ."""
    config = multimodal()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, router=BY_ROW))
    batch = multimodal_batch(config)
    labels = np.where(np.arange(8)[:, None] % 4 == 1, -100, batch.labels)
    batch = dataclasses.replace(batch, labels=labels)
    assert_equal(gradients(config, batch, microbatches=4), gradients(config, batch))


def test_chunks_and_rematerialisation_change_nothing_together():
    config, batch = text_only(router=BY_ROW, num_hidden_layers=2), packed_batch(CHUNK)
    mesh = dict(fsdp=2, expert=2)  # two rows to a device, a chunk each
    assert_equal(gradients(config, batch, mesh, moe_chunks=2, remat="attention"), gradients(config, batch, mesh))


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
    """Records that cannot be read leave padding; a batch of nothing else is passed over without harm."""
    router = RouterConfig(balance_coef=0.1, balance_in_group_coef=0.2, z_coef=0.01, z_in_group_coef=0.02)
    batch = packed_batch()
    empty = Batch(dataclasses.replace(batch.inputs, segment_ids=np.zeros_like(batch.inputs.segment_ids)), np.full_like(batch.labels, -100))
    metrics, found = gradients(text_only(router=router), empty, objective=Objective("square"))
    assert metrics["loss"] == metrics["objective"] == metrics["grad_norm"] == metrics["tokens"] == 0 and metrics["applied"]
    assert all((x == 0).all() for x in jax.tree.leaves(found)) and not any(np.isnan(x).any() for x in metrics.values())


def unpacked(batch: Batch) -> Batch:
    """Every document in a row of its own, its length as it was."""
    rows, ids = np.nonzero((batch.inputs.segment_ids[:, None, :] == np.array([1, 2])[:, None]).any(-1))
    chosen = batch.inputs.segment_ids[rows] == ids[:, None] + 1
    start = chosen.argmax(1)[:, None]
    at = np.minimum(start + np.arange(chosen.shape[1]), chosen.shape[1] - 1)
    inside = np.arange(chosen.shape[1]) < chosen.sum(1)[:, None]
    tokens, positions, labels = (
        np.where(inside, np.take_along_axis(x[rows], at, 1), empty)
        for x, empty in ((batch.inputs.tokens, 0), (batch.inputs.positions, 0), (batch.labels, -100))
    )
    return Batch(ModelInputs(tokens, positions, inside.astype(np.int32)), labels)


def test_mesh_packing_and_accumulation_change_nothing_together():
    """One device with two documents to a row, against eight devices, documents alone and four parts; all losses on, documents of different
    numbers of labels, some without any."""
    router = RouterConfig(balance_coef=0.1, balance_in_group_coef=0.2, z_coef=0.01, z_in_group_coef=0.02)
    config, batch, objective = text_only(router=router), packed_batch(), Objective("square")
    labels = np.where((np.arange(8)[:, None] == 3) & (batch.inputs.segment_ids == 2), -100, batch.labels)
    batch = dataclasses.replace(batch, labels=labels)
    alone = gradients(config, unpacked(batch), dict(fsdp=2, expert=2), objective, microbatches=4)
    together = gradients(config, batch, dict(fsdp=1), objective)
    assert_equal(alone, together)
    with jax.set_mesh(make_mesh()):
        _, by_token = jax.jit(loss_function)(create_model(config), place_batch(batch))
    assert not np.isclose(together[0]["loss"], by_token.loss, rtol=1e-3)


def random_stats(rows: int) -> RouterStats:
    values = [np.random.default_rng(i).uniform(1, 2, (3, rows, *shape)) for i, shape in enumerate([(8,), (8,), (8,), (), (), (), ()])]
    return RouterStats(*values, tokens=np.tile(np.arange(1.0, rows + 1), (3, 1)))


def test_router_losses_of_parts_add_up():
    stats = random_stats(4)
    parts = [jax.tree.map(lambda x, part=part: x[:, part], stats) for part in (slice(0, 1), slice(1, 4))]
    config = dataclasses.replace(text_config(router=BY_ROW), num_experts=8, router_n_groups=8)
    counts = Counts(weight=jnp.float32(0), tokens=stats.tokens[0].sum())
    whole = auxiliary_loss(config, stats, counts)
    np.testing.assert_allclose(sum(auxiliary_loss(config, p, counts) for p in parts), whole, rtol=1e-6)
    # Over microbatches it is the mean over the parts, by their tokens.
    config = dataclasses.replace(config, router=dataclasses.replace(BY_ROW, balance_over="microbatch", z_coef=0.0))
    one, rest = (auxiliary_loss(config, p, dataclasses.replace(counts, tokens=p.tokens[0].sum())) for p in parts)
    np.testing.assert_allclose(sum(auxiliary_loss(config, p, counts) for p in parts), (one * 1 + rest * 9) / 10, rtol=1e-6)


def test_contradictions_are_refused_with_their_numbers():
    config, batch = text_only(), packed_batch()
    with pytest.raises(
        ConfigError,
        match=r"moe_chunks=2: the 24 tokens of a device \(4 rows of 24 on 2 x 2 devices, one of 2 streams\)",
    ):
        gradients(config, batch, moe_chunks=2)
    with pytest.raises(ConfigError, match=r"microbatches=3: an array of 8 rows .* on each of 2 devices .* multiple of 6"):
        gradients(config, batch, microbatches=3)
    for wrong in (dict(remat="some"), dict(gradient_dtype="float16"), dict(microbatches=0), dict(moe_chunks=0)):
        ((name, value),) = wrong.items()
        with pytest.raises(ConfigError, match=f"StepConfig.{name}={value!r}"):
            StepConfig(**wrong)


def test_bfloat16_parameters_are_trained_with_stochastic_rounding_only():
    config = text_only(param_dtype="bfloat16")
    with jax.set_mesh(make_mesh(fsdp=2)):
        for stochastic in (False, True):
            optimizer = make_optimizer(OptimizerConfig(stochastic_rounding=stochastic, moment_dtype="bfloat16"), constant(1e-3))
            graph, state = init_state(create_model(config), optimizer)
            step, batch = make_train_step(graph, config.text, optimizer), place_batch(packed_batch())
            if not stochastic:
                with pytest.raises(ConfigError, match="parameters in bfloat16 cannot be trained"):
                    step(state, batch)
                continue
            losses = []
            for _ in range(4):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            assert losses[-1] < losses[0] and all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(nnx.as_pure(state.params)))


def test_stochastic_rounding_is_fair_and_the_same_on_any_mesh(mesh):
    x = jnp.full((4096,), 1 + 2**-9, jnp.float32)  # a quarter of the way from 1 to the next bfloat16
    x = x.at[0].set(jnp.inf).at[1].set(-jnp.inf).at[2].set(jnp.nan).at[3].set(0.0)
    rounded = np.asarray(jax.jit(stochastic_round)(x, jax.random.key(1)).astype(jnp.float32))
    assert rounded[0] == np.inf and rounded[1] == -np.inf and np.isnan(rounded[2]) and rounded[3] == 0
    assert set(rounded[4:].tolist()) == {1.0, 1.0078125}
    np.testing.assert_allclose((rounded[4:] > 1).mean(), 0.25, atol=0.03)  # 4 standard deviations
    with jax.set_mesh(make_mesh(fsdp=8)):
        split = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec("fsdp")))
        np.testing.assert_array_equal(jax.jit(stochastic_round)(split, jax.random.key(1)).astype(jnp.float32), rounded)
