"""Laws of growing batches: every pipeline batch is used once and in order, whatever the plan; the noise scale is that of the noise."""

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.batch_warmup import BatchWarmup, GrowingBatches, noise_estimates, noise_scale


class Numbered:
    def __getitem__(self, step):
        return {"x": np.full((2, 3), step)}

    def state(self, step):
        return {"step": step}


@pytest.mark.parametrize(
    "warmup",
    [BatchWarmup(), BatchWarmup((70,), (2,)), BatchWarmup((1, 2, 95), (2, 3, 8)), BatchWarmup((30, 1000), (4, 5))],
)
def test_every_batch_comes_once_and_in_order(warmup):
    plan = warmup.plan(batch_tokens=10)
    batches = GrowingBatches(Numbered(), plan, 1)
    used = [n for step in range(40) for n in batches[step]["x"][: plan.factor(step), 0].tolist()]
    assert used == list(range(len(used)))
    for step in range(40):
        assert batches.state(step) == {"step": plan.first(step)} and len(batches[step]["x"]) == 2 * plan.factor(step)
        seen = 10 * plan.first(step)
        assert plan.factor(step) == max([1, *(f for t, f in zip(warmup.tokens, warmup.factors, strict=True) if seen >= t)])


def test_the_noise_scale_of_known_noise():
    """Gradients g + noise of known variance: parts of a batch of 8 tokens each."""
    rng, parts, tokens, steps = np.random.default_rng(0), 4, 8, 4000
    gradient, deviation = rng.normal(size=20), 3.0
    noise = rng.normal(size=(steps, parts, 20)) * deviation / np.sqrt(tokens)
    of_parts = gradient + noise
    found = [noise_estimates((step**2).sum(-1).mean(), (step.mean(0) ** 2).sum(), parts) for step in of_parts]
    true, variance = np.array(found).T
    np.testing.assert_allclose(true.mean(), (gradient**2).sum(), rtol=0.05)
    expected = 20 * deviation**2 / (gradient**2).sum()
    assert noise_scale(true, variance, parts * tokens) == pytest.approx(expected, rel=0.05)
    assert np.isnan(noise_scale([-1.0], [1.0], 1))


def test_processes_have_the_rows_of_their_devices():
    """Four shards of two rows, of which a process has the last two; three batches joined."""
    growing = GrowingBatches(Numbered(), BatchWarmup().plan(1), 2)
    np.testing.assert_array_equal(growing.rows(np.arange(4, 8), 3), np.arange(12, 24))
    np.testing.assert_array_equal(growing.rows(np.arange(4, 8), 1), np.arange(4, 8))


@pytest.mark.parametrize("wrong", [dict(tokens=(5,)), dict(tokens=(5, 4), factors=(2, 3)), dict(tokens=(4, 5), factors=(1, 3))])
def test_contradictions_are_named(wrong):
    with pytest.raises(ConfigError, match="BatchWarmup"):
        BatchWarmup(**wrong)
