"""Laws of the learning-rate schedules."""

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.schedule import DECAY_SHAPES, constant, cosine, warmup_stable_decay


def rates(schedule, steps):
    return np.asarray(jax.vmap(schedule)(np.arange(steps)))


@pytest.mark.parametrize("shape", DECAY_SHAPES)
def test_warmup_stable_and_decay_meet_where_they_should(shape):
    lr = rates(warmup_stable_decay(2e-3, total_steps=100, warmup_steps=10, decay_steps=30, decay_shape=shape, final_fraction=0.1), 101)
    np.testing.assert_allclose(lr[:10], 2e-3 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:71], 2e-3, rtol=1e-6)
    assert (np.diff(lr[70:]) < 0).all()
    np.testing.assert_allclose(lr[100], 2e-4, rtol=1e-5)


def test_decay_shapes():
    half = {shape: rates(warmup_stable_decay(1.0, total_steps=8, decay_steps=8, decay_shape=shape), 5)[-1] for shape in DECAY_SHAPES}
    np.testing.assert_allclose([half["1-sqrt"], half["linear"], half["cosine"]], [1 - 0.5**0.5, 0.5, 0.5], rtol=1e-6)


def test_decay_is_a_tenth_unless_said():
    unsaid, said = (rates(warmup_stable_decay(1.0, 200, warmup_steps=5, **kw), 200) for kw in ({}, dict(decay_fraction=0.1)))
    np.testing.assert_array_equal(unsaid, said)
    assert unsaid[180] == 1 and unsaid[181] < 1


def test_constant_and_no_decay():
    np.testing.assert_array_equal(rates(constant(0.5), 3), 0.5)
    np.testing.assert_allclose(rates(constant(0.5, warmup_steps=1), 3), 0.5)
    np.testing.assert_allclose(rates(warmup_stable_decay(0.5, 4, warmup_steps=2, decay_steps=0), 4), [0.25, 0.5, 0.5, 0.5])


def test_cosine_by_definition():
    lr = rates(cosine(2.0, total_steps=50, warmup_steps=10, final_fraction=0.1), 51)
    np.testing.assert_allclose(lr[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(lr[10:], 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * np.arange(41) / 40)), rtol=1e-5)
    with pytest.raises(ConfigError, match="warmup_steps=60"):
        cosine(1.0, total_steps=50, warmup_steps=60)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(peak=0.0, total_steps=10), "peak=0.0"),
        (dict(peak=1.0, total_steps=0), "total_steps=0"),
        (dict(peak=1.0, total_steps=10, warmup_steps=-1), "warmup_steps=-1"),
        (dict(peak=1.0, total_steps=10, decay_steps=11), "decay_steps=11"),
        (dict(peak=1.0, total_steps=10, warmup_steps=6, decay_steps=5), "warmup_steps=6 and decay_steps=5"),
        (dict(peak=1.0, total_steps=10, decay_steps=5, decay_fraction=0.5), "decay_steps=5 and decay_fraction=0.5"),
        (dict(peak=1.0, total_steps=10, decay_fraction=1.5), "decay_fraction=1.5"),
        (dict(peak=1.0, total_steps=10, decay_shape="sqrt"), "decay_shape='sqrt'"),
        (dict(peak=1.0, total_steps=10, final_fraction=2.0), "final_fraction=2.0"),
    ],
)
def test_contradictions_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        warmup_stable_decay(**arguments)
