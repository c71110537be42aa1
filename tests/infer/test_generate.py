"""Laws of generation: decoding = forward, rows independent, stop tokens, devices."""

import jax
import numpy as np
import pytest

from interns1pro_jax.infer.generate import generate
from interns1pro_jax.infer.sampling import Sampling
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from tests.tiny import multimodal, multimodal_batch, random_inputs, text_only

CONFIG = text_only()
LENGTHS = np.array([12, 5, 9, 1])


def ragged(rows=4, left=False):
    inputs = random_inputs(rows)
    columns = np.arange(12)
    mask = columns >= 12 - LENGTHS[:rows, None] if left else columns < LENGTHS[:rows, None]
    tokens = inputs.tokens
    if left:
        tokens = np.stack([np.roll(t, 12 - n) for t, n in zip(tokens, LENGTHS, strict=False)])
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    return ModelInputs(np.where(mask, tokens, 0), positions, mask.astype(np.int32))


def alone(inputs, row):
    n = LENGTHS[row]
    return ModelInputs(inputs.tokens[row : row + 1, :n], np.arange(n, dtype=np.int32)[None], np.ones((1, n), np.int32))


@pytest.fixture
def model(mesh):
    return create_model(CONFIG)


def test_greedy_decoding_equals_the_uncached_forward(model):
    inputs = alone(ragged(), 2)
    result = generate(model, inputs, 6, return_logits=True)
    tokens = np.concatenate([inputs.tokens, result.tokens], 1)
    whole = ModelInputs(tokens, np.arange(15, dtype=np.int32)[None], np.ones((1, 15), np.int32))
    out = jax.jit(lambda m, i: m(i))(model, whole)
    logits = np.asarray(model.text.logits(out.hidden_BTD))[0, 8:-1]
    np.testing.assert_allclose(result.logits[0], logits, atol=5e-5)
    np.testing.assert_array_equal(result.tokens[0], logits.argmax(-1))
    np.testing.assert_array_equal(result.prompt_routing, out.routing_LBTGC[:, :, :9])
    np.testing.assert_array_equal(result.routing[:, :, :5], out.routing_LBTGC[:, :, 9:14])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)], ids=["greedy", "sampled"]
)
def test_rows_do_not_depend_on_each_other_or_on_the_side_of_padding(model, sampling):
    right, left = (generate(model, ragged(left=side), 5, sampling=sampling, seed=3) for side in (False, True))
    np.testing.assert_array_equal(right.tokens, left.tokens)
    first = generate(model, alone(ragged(), 0), 5, sampling=sampling, seed=3)
    np.testing.assert_array_equal(first.tokens[0], right.tokens[0])


def test_generation_ends_at_stop_tokens(model):
    free = generate(model, ragged(), 6)
    stop = int(free.tokens[1, 2])
    result = generate(model, ragged(), 6, stop_tokens=(stop,))
    for row in range(4):
        hits = np.nonzero(free.tokens[row] == stop)[0]
        length = hits[0] + 1 if hits.size else 6
        assert result.lengths[row] == length
        np.testing.assert_array_equal(result.tokens[row, :length], free.tokens[row, :length])
        assert (result.tokens[row, length:] == 0).all()


@pytest.mark.parametrize("sizes", [dict(expert=8), dict(fsdp=2, expert=4)], ids=str)
def test_eight_devices_equal_one(sizes):
    """Four rows on eight devices: rows are added and taken away again."""
    results = []
    for mesh_sizes in ({}, sizes):
        with jax.set_mesh(make_mesh(**mesh_sizes)):
            results.append(generate(create_model(CONFIG), ragged(), 5, return_logits=True))
    one, eight = results
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_allclose(one.logits, eight.logits, atol=1e-4)


@pytest.mark.parametrize("changes", [dict(router_n_groups=1, num_experts_per_tok=3), dict(router_n_groups=4)], ids=str)
def test_other_routers_decode_as_they_read(mesh, changes):
    """Plain top-k, and two experts in each group."""
    model, inputs = create_model(text_only(**changes)), alone(ragged(), 2)
    result = generate(model, inputs, 4, return_logits=True)
    tokens = np.concatenate([inputs.tokens, result.tokens], 1)
    out = jax.jit(lambda m, i: m(i))(model, ModelInputs(tokens, np.arange(13, dtype=np.int32)[None], np.ones((1, 13), np.int32)))
    np.testing.assert_allclose(result.logits[0], np.asarray(model.text.logits(out.hidden_BTD))[0, 8:-1], atol=5e-5)


def test_recorded_routing_can_be_replayed_whole(model):
    """What was not recorded (after a row's end, and at its last token) is left to the router."""
    free = generate(model, ragged(), 6)
    result = generate(model, ragged(), 6, stop_tokens=(int(free.tokens[1, 2]),))
    for row in range(4):
        known = result.routing[:, row] != 255
        assert known[:, : result.lengths[row] - 1].all() and not known[:, result.lengths[row] - 1 :].any()
    inputs = ragged()
    tokens, segments = (np.concatenate([a, b], 1) for a, b in ((inputs.tokens, result.tokens), (inputs.segment_ids, result.tokens * 0 + 1)))
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32)
    whole, replay = ModelInputs(tokens, positions, segments), np.concatenate([result.prompt_routing, result.routing], 2)
    out = jax.jit(lambda m, i, r: m(i, replay_LBTGC=r))(model, whole, replay)
    np.testing.assert_array_equal(np.where(replay == 255, out.routing_LBTGC, replay), out.routing_LBTGC)


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, expert=4)], ids=str)
def test_one_prompt_with_media_on_any_mesh(sizes):
    config = multimodal()
    batch = multimodal_batch(config).inputs
    first = jax.tree.map(lambda x: x[2:3], batch)
    with jax.set_mesh(make_mesh()):
        expected = generate(create_model(config), batch, 3, return_logits=True)
    with jax.set_mesh(make_mesh(**sizes)):
        result = generate(create_model(config), first, 3, return_logits=True)
    np.testing.assert_allclose(result.logits[0], expected.logits[2], atol=1e-4 * np.abs(expected.logits).max())


def test_bad_prompts_are_named(model):
    good = ragged()
    with pytest.raises(ValueError, match=r"rows \[1\] of the prompt hold no token"):
        generate(model, ModelInputs(good.tokens, good.positions, good.segment_ids * np.array([[1], [0], [1], [1]])), 2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, good, 0)
    with pytest.raises(ValueError, match=r"stop tokens \[96\] lie outside"):
        generate(model, good, 2, stop_tokens=(96,))
