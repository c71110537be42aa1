"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interns1pro_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample; the filters apply in this order. The default is greedy; `RELEASED` is the release's recommendation.

    Attributes:
      repetition_penalty: divides positive (multiplies negative) logits of tokens already in the row; 1 is off.
      temperature: divides the logits; 0 takes the largest.
      top_k: keeps the k largest; 0 is off.
      top_p: keeps the smallest set of most probable tokens whose mass reaches p; 1 is off.
      min_p: keeps tokens at least this fraction as probable as the most probable one; 0 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", self.temperature >= 0, "not be negative"),
            ("top_k", self.top_k >= 0, "not be negative"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "lie in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "be positive"),
        ):
            if not ok:
                raise ConfigError(f"Sampling.{name}={getattr(self, name)} must {rule}.")


GREEDY = Sampling()
RELEASED = Sampling(temperature=0.8, top_k=50, top_p=0.95)


def filtered_logits(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits in float32 after penalty, temperature and filters; excluded tokens are -inf. The best token is never excluded."""
    logits = logits_BV.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen_BV, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = jnp.sort(logits, -1, descending=True)
        probs = jax.nn.softmax(falling, -1)
        # A token stays if the mass before it is still short of p; the threshold is the last logit that stays.
        stays = jnp.cumsum(probs, -1) - probs < sampling.top_p
        threshold = jnp.min(jnp.where(stays, falling, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.min_p > 0:
        probs = jax.nn.softmax(logits, -1)
        logits = jnp.where(probs < sampling.min_p * probs.max(-1, keepdims=True), -jnp.inf, logits)
    return logits


def sample(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token for each row. Every row has its own random key, so that a row's result does not depend on its batch."""
    logits = filtered_logits(logits_BV, seen_BV, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys_B)
    return jnp.argmax(logits + noise, -1).astype(jnp.int32)
