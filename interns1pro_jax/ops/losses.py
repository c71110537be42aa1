"""Next-token losses and log-probabilities straight from hidden states, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.ops.layout import transposed_copy
from interns1pro_jax.ops.projection import gather_weight
from interns1pro_jax.ops.varying import as_varying, match_varying, varying_axes

IGNORED = -100

# Weight of a label as a power of the number of labels of its sample (Intern-S1 report, equations 3 and 4; spec 1.11): every label counts
# the same, or every sample, or what lies between.
AVERAGING: Mapping[str, float] = {"token": 0.0, "square": -0.5, "sample": -1.0}

# Logits held at a time, per device: 128 MiB in fp32; but at least these tokens, so that products stay large: each chunk also reads and
# writes the gradient of the whole head, 5 GB at the released sizes, for logits of 1.3 GB.
_MAX_LOGITS = 2**25
_LEAST_CHUNK = 2048


def label_weights(labels_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], averaging: str) -> Float[Array, "B T"]:
    """`AVERAGING` of the labels in float32: l to its power, l being the labels of the document that a position belongs to; 0 where the
    label is -100. A document is a segment of a row, so a text that was cut into several rows is several.
    """
    if not AVERAGING[averaging]:
        return (labels_BT != IGNORED).astype(jnp.float32)
    row = sharding.spec("batch", None)

    def weights(labels_BT: Array, segment_ids_BT: Array) -> Array:
        counted_BT = labels_BT != IGNORED
        counts_BS = jax.vmap(lambda mask_T, ids_T: jnp.zeros(ids_T.size + 1, jnp.int32).at[ids_T].add(mask_T))(counted_BT, segment_ids_BT)
        count_BT = jnp.take_along_axis(counts_BS, segment_ids_BT, axis=1)
        return jnp.where(counted_BT, jnp.maximum(count_BT, 1).astype(jnp.float32) ** AVERAGING[averaging], 0)

    return jax.shard_map(weights, in_specs=(row, row), out_specs=row)(
        *(sharding.constrain(x, "batch", None) for x in (labels_BT, segment_ids_BT))
    )


def ordered_sums(x_BT: Float[Array, "B T *rest"]) -> Float[Array, "*rest"]:
    """The sum over all tokens, in float32. The sums of the devices are gathered and added in their order: an all-reduce of a scalar adds
    them in any order, and a run that is started again would differ from one that was not."""
    spec = jax.typeof(x_BT).sharding.spec
    by_device = jax.shard_map(
        lambda x: x.sum((0, 1), dtype=jnp.float32)[None], in_specs=spec, out_specs=PartitionSpec(_axes(spec), *(None,) * (x_BT.ndim - 2))
    )(x_BT)
    return jax.sharding.reshard(by_device, PartitionSpec()).sum(0)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for dim in spec for axis in ((dim,) if isinstance(dim, str) else dim or ()))


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    lm_head_DV: Float[Array, "D V"],
    labels_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the losses -log p(label), times their weights if there are any, and the number of labels (those that are not -100). There is
    no gradient with respect to the weights.

    Products in the dtype of `hidden_BTD`, everything else in fp32. Each device goes through its own tokens chunk by chunk. Since
    the result is one sum, the gradients of a chunk are known up to one common factor as soon as its logits are: they are
    computed in the same visit, so that no logits are kept or computed again for the backward pass.
    """
    used = _axes(PartitionSpec(*jax.typeof(hidden_BTD).sharding.spec[:2]))
    weights_BT = (labels_BT != IGNORED).astype(jnp.float32) if weights_BT is None else weights_BT

    def sums(hidden_ND: Array, lm_head_DV: Array, labels_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
        labels_N = labels_BT.reshape(-1)
        return _sum_of_losses(hidden_ND, lm_head_DV, labels_N, weights_BT.reshape(-1))[None], jnp.sum(labels_N != IGNORED)[None]

    by_device = _on_each_device(sums, PartitionSpec(used), hidden_BTD, lm_head_DV, labels_BT, weights_BT)
    # Added in their order: see `ordered_sums`.
    total, count = (jax.sharding.reshard(part, PartitionSpec()).sum() for part in by_device)
    return total, count


def token_log_probs(
    hidden_BTD: Float[Array, "B T D"], lm_head_DV: Float[Array, "D V"], labels_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """log p(label) of each position in fp32, split as `hidden_BTD` is; 0 where the label is -100. Differentiable, whatever is made of
    the values: the backward computes each chunk's logits again."""
    tokens_spec = PartitionSpec(*jax.typeof(hidden_BTD).sharding.spec[:2])

    def log_probs(hidden_ND: Array, lm_head_DV: Array, labels_BT: Array) -> Array:
        return _log_probs(hidden_ND, lm_head_DV, labels_BT.reshape(-1)).reshape(labels_BT.shape)

    return _on_each_device(log_probs, tokens_spec, hidden_BTD, lm_head_DV, labels_BT)


def _on_each_device(function: Callable, out_specs: PartitionSpec, hidden_BTD: Array, lm_head_DV: Array, *by_token: Array) -> Any:
    """`function(hidden_ND, lm_head_DV, *by_token)` of each device's tokens and the whole matrix in the hidden states' dtype."""
    hidden_spec, lm_head_spec = jax.typeof(hidden_BTD).sharding.spec, jax.typeof(lm_head_DV).sharding.spec
    tokens_spec = PartitionSpec(*hidden_spec[:2])

    def local(hidden_BTD: Array, lm_head_DV: Array, *by_token: Array) -> Any:
        with jax.named_scope("lm_head"):
            lm_head_DV = gather_weight(lm_head_DV, lm_head_spec, hidden_BTD.dtype, varying_axes(hidden_BTD))
        return function(*match_varying(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), lm_head_DV, *by_token))

    return jax.shard_map(local, in_specs=(hidden_spec, lm_head_spec, *(tokens_spec,) * len(by_token)), out_specs=out_specs)(
        hidden_BTD, lm_head_DV, *(jax.sharding.reshard(x, tokens_spec) for x in by_token)
    )


def cross_entropy_reference(
    hidden_BTD: Float[Array, "B T D"],
    lm_head_DV: Float[Array, "D V"],
    labels_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"] | float = 1.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`cross_entropy` with all logits at once."""
    return -jnp.sum(token_log_probs_reference(hidden_BTD, lm_head_DV, labels_BT) * weights_BT), jnp.sum(labels_BT != IGNORED)


def token_log_probs_reference(
    hidden_BTD: Float[Array, "B T D"], lm_head_DV: Float[Array, "D V"], labels_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """`token_log_probs` with all logits at once."""
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, lm_head_DV.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
    hot_BTV = jnp.arange(logits_BTV.shape[-1]) == labels_BT[..., None]
    log_probs_BT = jnp.sum(jnp.where(hot_BTV, logits_BTV, 0), axis=-1) - jax.nn.logsumexp(logits_BTV, axis=-1)
    return jnp.where(labels_BT != IGNORED, log_probs_BT, 0)


@jax.custom_vjp
def _sum_of_losses(hidden_ND: Array, lm_head_DV: Array, labels_N: Array, weights_N: Array) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        labels_C, hidden_CD, weights_C = chunk
        losses_C, _, _ = _chunk_losses(hidden_CD, labels_C, lm_head_DV)
        return total + (losses_C * weights_C).sum(), None

    total = as_varying(jnp.float32(0), varying_axes(hidden_ND))
    return jax.lax.scan(add_chunk, total, _chunks(lm_head_DV.shape[1], labels_N, hidden_ND, weights_N))[0]


def _forward(hidden_ND: Array, lm_head_DV: Array, labels_N: Array, weights_N: Array) -> tuple[Array, tuple[Array, Array]]:
    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, grad_head_DV = carry
        labels_C, hidden_CD, weights_C = chunk
        losses_C, logits_CV, log_z_C = _chunk_losses(hidden_CD, labels_C, lm_head_DV)
        grad_hidden_CD, more_DV = _chunk_gradients(hidden_CD, labels_C, lm_head_DV, logits_CV, log_z_C, weights_C[:, None])
        return (total + (losses_C * weights_C).sum(), grad_head_DV + more_DV), grad_hidden_CD

    zeros = as_varying(jnp.float32(0), varying_axes(hidden_ND)), jnp.zeros_like(lm_head_DV, jnp.float32)
    (total, grad_head_DV), grad_hidden = jax.lax.scan(add_chunk, zeros, _chunks(lm_head_DV.shape[1], labels_N, hidden_ND, weights_N))
    return total, (_joined(grad_hidden, labels_N.size), grad_head_DV.astype(lm_head_DV.dtype))


def _backward(gradients: tuple[Array, Array], factor: Array) -> tuple[Array, Array, None, None]:
    grad_hidden_ND, grad_head_DV = (gradient * factor.astype(gradient.dtype) for gradient in gradients)
    return grad_hidden_ND, grad_head_DV, None, None


_sum_of_losses.defvjp(_forward, _backward)


@jax.custom_vjp
def _log_probs(hidden_ND: Array, lm_head_DV: Array, labels_N: Array) -> Array:
    return _log_probs_forward(hidden_ND, lm_head_DV, labels_N)[0]


def _log_probs_forward(hidden_ND: Array, lm_head_DV: Array, labels_N: Array) -> tuple[Array, tuple[Array, ...]]:
    def chunk_log_probs(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        labels_C, hidden_CD = chunk
        losses_C, _, log_z_C = _chunk_losses(hidden_CD, labels_C, lm_head_DV)
        return -losses_C, log_z_C

    chunks = jax.lax.map(chunk_log_probs, _chunks(lm_head_DV.shape[1], labels_N, hidden_ND))
    log_probs_N, log_z_N = (_joined(x, labels_N.size) for x in chunks)
    return log_probs_N, (hidden_ND, lm_head_DV, labels_N, log_z_N)


def _log_probs_backward(saved: tuple[Array, ...], grad_N: Array) -> tuple[Array, Array, None]:
    hidden_ND, lm_head_DV, labels_N, log_z_N = saved

    def add_chunk(grad_head_DV: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        labels_C, hidden_CD, log_z_C, grad_C = chunk
        logits_CV = jnp.dot(hidden_CD, lm_head_DV, preferred_element_type=jnp.float32)
        grad_hidden_CD, more_DV = _chunk_gradients(hidden_CD, labels_C, lm_head_DV, logits_CV, log_z_C, -grad_C[:, None])
        return grad_head_DV + more_DV, grad_hidden_CD

    chunks = _chunks(lm_head_DV.shape[1], labels_N, hidden_ND, log_z_N, grad_N)
    grad_head_DV, grad_hidden = jax.lax.scan(add_chunk, jnp.zeros_like(lm_head_DV, jnp.float32), chunks)
    return _joined(grad_hidden, labels_N.size), grad_head_DV.astype(lm_head_DV.dtype), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _chunks(vocabulary: int, labels_N: Array, *arrays: Array) -> tuple[Array, ...]:
    """Labels, and arrays of as many tokens, in chunks of as many rows as the limit on logits allows; the last is filled up with ignored
    labels and zeros."""
    num_tokens = labels_N.size
    rows = min(num_tokens, max(_LEAST_CHUNK, _MAX_LOGITS // vocabulary))
    padding = -num_tokens % rows
    padded = [jnp.pad(labels_N, (0, padding), constant_values=IGNORED)]
    padded += [jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in arrays]
    return tuple(x.reshape(-1, rows, *x.shape[1:]) for x in padded)


def _joined(chunks: Array, num_tokens: int) -> Array:
    """The inverse of `_chunks` for one array."""
    return chunks.reshape(-1, *chunks.shape[2:])[:num_tokens]


def _chunk_losses(hidden_CD: Array, labels_C: Array, lm_head_DV: Array) -> tuple[Array, Array, Array]:
    """Losses of the tokens of a chunk (0 where ignored), their logits, and the logarithms of the softmax denominators."""
    logits_CV = jnp.dot(hidden_CD, lm_head_DV, preferred_element_type=jnp.float32)
    log_z_C = jax.nn.logsumexp(logits_CV, axis=1)
    counted_C = labels_C != IGNORED
    label_logits_C = jnp.take_along_axis(logits_CV, jnp.where(counted_C, labels_C, 0)[:, None], axis=1)[:, 0]
    return jnp.where(counted_C, log_z_C - label_logits_C, 0), logits_CV, log_z_C


def _chunk_gradients(
    hidden_CD: Array, labels_C: Array, lm_head_DV: Array, logits_CV: Array, log_z_C: Array, factor: Array
) -> tuple[Array, Array]:
    """Gradients of the losses of a chunk, times `factor`, with respect to the hidden states and the matrix (fp32)."""
    hot_CV = jnp.arange(logits_CV.shape[1]) == labels_C[:, None]
    grad_CV = factor * (jnp.exp(logits_CV - log_z_C[:, None]) - hot_CV)
    grad_CV = jnp.where((labels_C == IGNORED)[:, None], 0, grad_CV).astype(hidden_CD.dtype)
    grad_hidden_CD = jax.lax.dot_general(grad_CV, lm_head_DV, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return grad_hidden_CD.astype(hidden_CD.dtype), jnp.dot(transposed_copy(hidden_CD), grad_CV, preferred_element_type=jnp.float32)
