"""The decoder with quantised activations (W8A8), by definition, in NumPy: for the emulated logits of an FP8 checkpoint.

The serving engines round the input of every quantised matrix (spec 7). The model does not, so this is a second, plain decoder
with a hook at the inputs of its matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from interns1pro_jax.config import TextConfig
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.ops.quantization import dequantize_activations, quantize_activations
from tools.parity.subject import Subject

Linear = Callable[[str, np.ndarray], np.ndarray]
_LAYERS = "model.language_model."


def emulated_logits(subject: Subject, inputs: ModelInputs) -> np.ndarray:
    """Logits [B, T, V] with the input of every FP8 matrix rounded per token and per 128 channels (block width of the config)."""
    quantization = subject.config.quantization
    width = 128 if quantization is None else quantization.weight_block_size[1]

    def rounded(name: str, x: np.ndarray) -> np.ndarray:
        if subject.stored[name].dtype != "F8_E4M3":
            return x
        return np.asarray(_round(jnp.asarray(x), width))

    return decode(subject.tensors, subject, inputs, rounded)


@functools.partial(jax.jit, static_argnames="width")
def _round(x: jax.Array, width: int) -> jax.Array:
    return dequantize_activations(*quantize_activations(x, width), width)


def decode(tensors: Mapping[str, np.ndarray], subject: Subject, inputs: ModelInputs, matrix_input: Linear) -> np.ndarray:
    """The text decoder of spec section 2 in float32.

    Args:
      tensors: weights under their released names.
      matrix_input: called with the name of a decoder layer's matrix and its input; returns the input to use.
    """
    text = subject.config.text
    cos, sin = (np.asarray(table) for table in subject.model.text.rotary(inputs.positions))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y = matrix_input(name + ".weight", x) @ tensors[name + ".weight"].T
        return y + tensors[name + ".bias"] if name + ".bias" in tensors else y

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + text.rms_norm_eps) * tensors[name + ".weight"]

    def swiglu(where: str, x: np.ndarray) -> np.ndarray:
        gate = linear(where + "gate_proj", x)
        return linear(where + "down_proj", gate / (1 + np.exp(-gate)) * linear(where + "up_proj", x))

    segments, index = np.asarray(inputs.segment_ids), np.arange(inputs.tokens.shape[1])
    allowed = (segments[:, :, None] == segments[:, None, :]) & (index[:, None] >= index)
    x = tensors[_LAYERS + "embed_tokens.weight"][np.asarray(inputs.tokens)]
    for layer in range(text.num_hidden_layers):
        where = f"{_LAYERS}layers.{layer}."
        h = norm(where + "input_layernorm", x)
        q, k, v = (linear(f"{where}self_attn.{part}_proj", h).reshape(*h.shape[:2], -1, text.head_dim) for part in "qkv")
        q, k = _rotate(norm(where + "self_attn.q_norm", q), cos, sin), _rotate(norm(where + "self_attn.k_norm", k), cos, sin)
        k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        scores = np.einsum("btqh,bsqh->bqts", q, k) * text.head_dim**-0.5
        mixed = np.einsum("bqts,bsqh->btqh", _softmax(np.where(allowed[:, None], scores, -np.inf)), v)
        x = x + linear(where + "self_attn.o_proj", mixed.reshape(*h.shape[:2], -1))
        h = norm(where + "post_attention_layernorm", x)
        if text.is_moe(layer):
            weights = _routing(text, linear(where + "mlp.gate", h))
            for expert in range(text.num_experts):
                # All tokens, also those that do not choose the expert: arrays of one shape, compiled once.
                x += weights[..., expert, None] * swiglu(f"{where}mlp.experts.{expert}.", h)
        else:
            x = x + swiglu(where + "mlp.", h)
    return norm(_LAYERS + "norm", x) @ tensors["lm_head.weight"].T


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    cos, sin = (np.repeat(table, x.shape[2] // table.shape[2], axis=2) for table in (cos, sin))
    first, second = np.split(x, 2, -1)
    return x * cos + np.concatenate([-second, first], -1) * sin


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _routing(text: TextConfig, logits: np.ndarray) -> np.ndarray:
    """Weights of all experts [B, T, E], zero where not chosen (spec 2.4)."""
    probs = _softmax(logits).reshape(*logits.shape[:-1], text.router_n_groups, -1)
    chosen = np.argsort(-probs, -1)[..., : text.experts_per_group_per_token]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights, chosen, np.take_along_axis(probs, chosen, -1), -1)
    weights = weights.reshape(logits.shape)
    return weights / weights.sum(-1, keepdims=True) if text.norm_topk_prob else weights
