"""Next-token loss straight from hidden states, without ever holding all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.layout import transposed_copy
from interns1pro_jax.ops.varying import as_varying, match_varying, varying_axes

IGNORED = -100

# Logits held at a time, per device: 128 MiB in fp32; but at least these tokens, so that products stay large.
_MAX_LOGITS = 2**25
_LEAST_CHUNK = 128


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"], lm_head_DV: Float[Array, "D V"], labels_BT: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the losses -log p(label), and the number of labels counted (those that are not -100).

    Products in the dtype of `hidden_BTD`, everything else in fp32. Each device goes through its own tokens chunk by chunk. Since
    the result is one sum, the gradients of a chunk are known up to one common factor as soon as its logits are: they are
    computed in the same visit, so that no logits are kept or computed again for the backward pass.
    """
    hidden_spec, lm_head_spec = jax.typeof(hidden_BTD).sharding.spec, jax.typeof(lm_head_DV).sharding.spec
    tokens_spec = PartitionSpec(*hidden_spec[:2])
    split_D = lm_head_spec[0] or ()

    def local(hidden_BTD: Array, lm_head_DV: Array, labels_BT: Array) -> tuple[Array, Array]:
        axes = varying_axes(hidden_BTD)
        labels_N = labels_BT.reshape(-1)
        with jax.named_scope("lm_head_all_gather"):
            lm_head_DV = as_varying(lm_head_DV.astype(hidden_BTD.dtype), axes)
            lm_head_DV = jax.lax.all_gather(lm_head_DV, split_D, axis=0, tiled=True) if split_D else lm_head_DV
        total = _sum_of_losses(*match_varying(hidden_BTD.reshape(labels_N.size, -1), lm_head_DV, labels_N))
        return total[None], jnp.sum(labels_N != IGNORED)[None]

    used = tuple(axis for dim in tokens_spec for axis in ((dim,) if isinstance(dim, str) else dim or ()))
    by_device = jax.shard_map(local, in_specs=(hidden_spec, lm_head_spec, tokens_spec), out_specs=PartitionSpec(used))(
        hidden_BTD, lm_head_DV, jax.sharding.reshard(labels_BT, tokens_spec)
    )
    # The sums of the devices are gathered and added in their order: an all-reduce of a scalar adds them in any order, and a run
    # that is started again would differ from one that was not.
    total, count = (jax.sharding.reshard(part, PartitionSpec()).sum() for part in by_device)
    return total, count


def cross_entropy_reference(
    hidden_BTD: Float[Array, "B T D"], lm_head_DV: Float[Array, "D V"], labels_BT: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`cross_entropy` with all logits at once."""
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, lm_head_DV.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
    counted_BT = labels_BT != IGNORED
    hot_BTV = jnp.arange(logits_BTV.shape[-1]) == labels_BT[..., None]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.sum(jnp.where(hot_BTV, logits_BTV, 0), axis=-1)
    return jnp.sum(jnp.where(counted_BT, losses_BT, 0)), jnp.sum(counted_BT)


@jax.custom_vjp
def _sum_of_losses(hidden_ND: Array, lm_head_DV: Array, labels_N: Array) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        losses, _, _ = _chunk_losses(*chunk, lm_head_DV)
        return total + losses.sum(), None

    total = as_varying(jnp.float32(0), varying_axes(hidden_ND))
    return jax.lax.scan(add_chunk, total, _chunks(hidden_ND, labels_N, lm_head_DV.shape[1]))[0]


def _forward(hidden_ND: Array, lm_head_DV: Array, labels_N: Array) -> tuple[Array, tuple[Array, Array]]:
    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, grad_head_DV = carry
        hidden_CD, labels_C = chunk
        losses_C, logits_CV, log_z_C = _chunk_losses(hidden_CD, labels_C, lm_head_DV)
        hot_CV = jnp.arange(logits_CV.shape[1]) == labels_C[:, None]
        grad_CV = jnp.where((labels_C == IGNORED)[:, None], 0, jnp.exp(logits_CV - log_z_C[:, None]) - hot_CV).astype(hidden_CD.dtype)
        grad_hidden_CD = jax.lax.dot_general(grad_CV, lm_head_DV, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        grad_head_DV += jnp.dot(transposed_copy(hidden_CD), grad_CV, preferred_element_type=jnp.float32)
        return (total + losses_C.sum(), grad_head_DV), grad_hidden_CD.astype(hidden_CD.dtype)

    axes = varying_axes(hidden_ND)
    zeros = as_varying(jnp.float32(0), axes), as_varying(jnp.zeros(lm_head_DV.shape, jnp.float32), axes)
    chunks = _chunks(hidden_ND, labels_N, lm_head_DV.shape[1])
    (total, grad_head_DV), grad_hidden = jax.lax.scan(add_chunk, zeros, chunks)
    grad_hidden_ND = grad_hidden.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return total, (grad_hidden_ND, grad_head_DV.astype(lm_head_DV.dtype))


def _backward(gradients: tuple[Array, Array], factor: Array) -> tuple[Array, Array, None]:
    grad_hidden_ND, grad_head_DV = (gradient * factor.astype(gradient.dtype) for gradient in gradients)
    return grad_hidden_ND, grad_head_DV, None


_sum_of_losses.defvjp(_forward, _backward)


def _chunks(hidden_ND: Array, labels_N: Array, vocabulary: int) -> tuple[Array, Array]:
    """Tokens in chunks of as many rows as the limit on logits allows, the last one filled up with ignored labels."""
    num_tokens = labels_N.size
    rows = min(num_tokens, max(_LEAST_CHUNK, _MAX_LOGITS // vocabulary))
    padding = -num_tokens % rows
    hidden_ND = jnp.pad(hidden_ND, ((0, padding), (0, 0)))
    labels_N = jnp.pad(labels_N, (0, padding), constant_values=IGNORED)
    return hidden_ND.reshape(-1, rows, hidden_ND.shape[1]), labels_N.reshape(-1, rows)


def _chunk_losses(hidden_CD: Array, labels_C: Array, lm_head_DV: Array) -> tuple[Array, Array, Array]:
    """Losses of the tokens of a chunk (0 where ignored), their logits, and the logarithms of the softmax denominators."""
    logits_CV = jnp.dot(hidden_CD, lm_head_DV, preferred_element_type=jnp.float32)
    log_z_C = jax.nn.logsumexp(logits_CV, axis=1)
    counted_C = labels_C != IGNORED
    label_logits_C = jnp.take_along_axis(logits_CV, jnp.where(counted_C, labels_C, 0)[:, None], axis=1)[:, 0]
    return jnp.where(counted_C, log_z_C - label_logits_C, 0), logits_CV, log_z_C
