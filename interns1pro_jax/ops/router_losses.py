"""Auxiliary losses of the router, over true (unpadded) tokens (spec 1.1, 2.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def balance_loss(load_LE: Float[Array, "L E"], mass_LE: Float[Array, "L E"], tokens: Float[Array, ""], groups: int = 1) -> Float[Array, ""]:
    """Load-balancing loss of the experts actually chosen: mean over layers of `E * sum_e f_e * P_e`; 1 when balanced.

    f_e is the share of assignments that expert e got (no gradient), P_e its mean probability. With `groups` > 1 shares are those within
    a group, probabilities have to be, and the mean over groups is taken: it measures what grouping leaves unbalanced.

    The loss is linear in `mass_LE`: with the loads of a whole batch, those of its parts add up.

    Args:
      load_LE: assignments of each expert, of all tokens that its share is taken of.
      mass_LE: sums of the probabilities from a softmax over all experts, or over those of each group.
      tokens: number of tokens that the loss is a mean over.
    """
    layers, experts = load_LE.shape
    load = jax.lax.stop_gradient(load_LE).reshape(layers, groups, experts // groups)
    mass = mass_LE.reshape(load.shape) / jnp.maximum(tokens, 1)
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
    return (experts // groups) * (share * mass).sum(-1).mean()


def z_loss(z_L: Float[Array, " L"], tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Mean over layers and tokens of logsumexp(logits)^2."""
    return z_L.mean() / jnp.maximum(tokens, 1)


def global_topk_balance_loss(logits_LNE: Float[Array, "L N E"], valid_N: Bool[Array, " N"], top_k: int) -> Float[Array, ""]:
    """The balancing loss of the Hugging Face implementation (spec 2.4): layers are pooled before the product, and the load is
    that of a *global* top-k, which ignores the groups. For parity; training uses `balance_loss`."""
    experts = logits_LNE.shape[-1]
    probs = jax.nn.softmax(logits_LNE.astype(jnp.float32), -1)
    chosen = jax.nn.one_hot(jax.lax.top_k(probs, top_k)[1], experts).sum(-2)
    weight = valid_N.astype(jnp.float32)[None, :, None]
    count = weight.sum() * logits_LNE.shape[0]
    share = (chosen * weight).sum((0, 1)) / count
    mass = (probs * weight).sum((0, 1)) / count
    return experts * (jax.lax.stop_gradient(share) * mass).sum()
