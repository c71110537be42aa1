"""Laws of the decoder: packed = alone, cached = uncached, replayed = recorded, remat = none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import check_inputs, create_model
from interns1pro_jax.models.text import KVCache
from tests.tiny import random_inputs, text_only

CONFIG = text_only(num_hidden_layers=3, mlp_only_layers=(1,))


@pytest.fixture
def model(mesh):
    return create_model(CONFIG)


@jax.jit
def forward(model, inputs, replay=None):
    out = model(inputs, replay_LBTGC=replay)
    return model.text.logits(out.hidden_BTD), out.routing_LBTGC


def test_packed_documents_equal_documents_alone(model):
    inputs = random_inputs(rows=1, length=20)
    lengths = [7, 9, 3]
    positions = np.concatenate([np.arange(n) for n in lengths] + [[0]]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 1]).astype(np.int32)[None]
    packed, _ = forward(model, ModelInputs(inputs.tokens, positions, segments))
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        alone, _ = forward(model, ModelInputs(inputs.tokens[:, part], positions[:, part], np.ones((1, n), np.int32)))
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)
        start += n


def test_positions_matter(model):
    """Fourier encoding is not shift-invariant: a test of the test above."""
    inputs = random_inputs(rows=1, length=7)
    shifted = ModelInputs(inputs.tokens, inputs.positions + 5, inputs.segment_ids)
    assert np.abs(forward(model, inputs)[0] - forward(model, shifted)[0]).max() > 1e-3


@pytest.mark.parametrize("chunks", [(12,), (8, 1, 1, 1, 1), (5, 4, 3)], ids=str)
def test_cached_equals_uncached(model, chunks):
    inputs = random_inputs(rows=2)
    whole, routing = forward(model, inputs)

    @jax.jit
    def cached(model, piece, cache):
        out = model(piece, cache=cache)
        return model.text.logits(out.hidden_BTD), out.routing_LBTGC, out.cache

    cache, start = KVCache.empty(CONFIG.text, 2, 16), 0
    for n in chunks:
        piece = jax.tree.map(lambda x, part=slice(start, start + n): x[:, part], inputs)
        logits, ids, cache = cached(model, piece, cache)
        np.testing.assert_allclose(logits, whole[:, start : start + n], atol=2e-5)
        np.testing.assert_array_equal(ids, routing[:, :, start : start + n])
        start += n
    assert int(cache.length) == 12


def test_a_full_cache_is_seen(model):
    inputs = random_inputs(rows=1)
    forward = jax.jit(lambda m, i, cache: m(i, cache=cache))
    out = forward(model, inputs, KVCache.empty(CONFIG.text, 1, 14))
    assert np.isfinite(out.hidden_BTD).all()
    assert np.isnan(forward(model, inputs, out.cache).hidden_BTD).all()
    with pytest.raises(ValueError, match="12 tokens do not fit in a cache of 5 slots"):
        forward(model, inputs, KVCache.empty(CONFIG.text, 1, 5))


def test_replay_of_recorded_routing_changes_nothing_and_other_routing_does(model):
    inputs = random_inputs(rows=2)
    logits, routing = forward(model, inputs)
    routing = np.asarray(routing)  # replays come from the host
    assert routing.dtype == jnp.uint8 and routing.shape == (2, 2, 12, 8, 1)
    np.testing.assert_array_equal(forward(model, inputs, routing)[0], logits)
    other, recorded = forward(model, inputs, (routing + 1) % 4)
    np.testing.assert_array_equal(recorded, (routing + 1) % 4)
    assert np.abs(other - logits).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots", "attention_operands", "offload_attention"])
def test_rematerialisation_changes_no_gradient(model, remat):
    from flax import nnx

    graph, state = nnx.split(model)
    inputs = random_inputs(rows=2)

    def gradient(remat):
        return jax.jit(jax.grad(lambda s: (nnx.merge(graph, s)(inputs, remat=remat).hidden_BTD ** 2).sum(), allow_int=True))(state)

    for plain, again in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-4)


def test_inputs_that_cannot_be_right(mesh):
    inputs = random_inputs(rows=1)
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.95, got 0\.\.96"):
        check_inputs(CONFIG, ModelInputs(np.array([[0, 96]]), inputs.positions[:, :2], inputs.segment_ids[:, :2]))
