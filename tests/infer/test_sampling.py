"""The filters of sampling, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.infer.sampling import Sampling, filtered_logits, sample

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.06, 0.04]]))
NONE_SEEN = jnp.zeros(LOGITS.shape, bool)


def kept(**options):
    return np.isfinite(filtered_logits(LOGITS, NONE_SEEN, Sampling(temperature=1.0, **options)))[0].tolist()


def test_filters_by_hand():
    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.69) == [True, True, False, False, False]
    assert kept(top_p=0.71) == [True, True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False, False]
    assert kept(min_p=0.4) == [True, True, True, False, False]
    assert kept(top_k=3, top_p=0.5) == [True, True, False, False, False]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    out = filtered_logits(logits, jnp.array([[True, True, False]]), Sampling(repetition_penalty=2.0))
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0]])


def test_samples_follow_the_filtered_distribution():
    n = 20000
    keys = jax.random.split(jax.random.key(0), n)
    tokens = sample(jnp.tile(LOGITS, (n, 1)), jnp.zeros((n, 5), bool), keys, Sampling(temperature=0.5, top_k=3))
    expected = np.array([0.4, 0.3, 0.2]) ** 2
    np.testing.assert_allclose(np.bincount(tokens, minlength=5)[:3] / n, expected / expected.sum(), atol=0.015)
    assert (np.asarray(tokens) < 3).all()


@pytest.mark.parametrize(
    "options", [dict(temperature=-1), dict(top_p=0), dict(min_p=1), dict(repetition_penalty=0), dict(top_k=-1)], ids=str
)
def test_impossible_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)
