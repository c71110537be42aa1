"""One checkpoint directory under test: its config, and its models, loaded when first needed and kept."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from interns1pro_jax.checkpoint.hf_import import load_model, parameters_of
from interns1pro_jax.checkpoint.hf_names import HfParameter
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, open_checkpoint
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import InternS1Pro, check_inputs


class Subject:
    """A checkpoint in the released layout. Everything about it is derived from its own files."""

    def __init__(self, directory: Path):
        self.directory = directory

    @functools.cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.directory)

    @functools.cached_property
    def stored(self) -> Checkpoint:
        """The tensors as the files hold them."""
        return open_checkpoint(self.directory)

    @functools.cached_property
    def model(self) -> InternS1Pro:
        """Weights upcast to float32, all arithmetic in float32."""
        return load_model(self.directory, dtype="float32", param_dtype="float32")

    @functools.cached_property
    def bf16_model(self) -> InternS1Pro:
        return load_model(self.directory, dtype="bfloat16", param_dtype="bfloat16")

    @functools.cached_property
    def parameters(self) -> tuple[HfParameter, ...]:
        """The table of tensor names in the layout that this checkpoint has."""
        return parameters_of(self.stored, self.config)

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The float32 model's parameters under their released names and shapes (FP8 ones dequantised)."""
        return hf_tensors(self.parameters, nnx.state(self.model))


def hf_tensors(parameters: tuple[HfParameter, ...], state: Any) -> dict[str, np.ndarray]:
    """Parameters, or anything linear in them such as gradients, as tensors of the released layout.

    Args:
      parameters: the name table; entries without an array in `state` are left out.
      state: `nnx.State` of the model, or of its gradients.
    """
    arrays = {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters:
        if parameter.path not in arrays:
            continue
        array, layout = arrays[parameter.path], parameter.layout.inverse()
        width = array.shape[-1] // len(parameter.names)
        for position, number, name in parameter.tensors():
            tensors[name] = layout.apply(array[position][..., number * width : (number + 1) * width])
    return tensors


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward pass with everything in it, as float32 arrays in the shapes of the goldens."""

    embeddings: np.ndarray  # [B, T, D]
    hidden_states: np.ndarray  # [L, B, T, D]
    attn_out: np.ndarray  # [L, B, T, D]
    mlp_out: np.ndarray  # [L, B, T, D]
    final_norm: np.ndarray  # [B, T, D]
    logits: np.ndarray  # [B, T, V]
    rope_cos: np.ndarray  # [B, T, heads, H]
    rope_sin: np.ndarray  # [B, T, heads, H]
    router_logits: np.ndarray | None  # [M, B*T, E]
    router_weights: np.ndarray | None  # [M, B*T, K]
    router_indices: np.ndarray | None  # [M, B*T, K]: ids among all experts, group after group


def forward(model: InternS1Pro, inputs: ModelInputs) -> Forward:
    """Runs the model on host-made inputs.

    Raises:
      ValueError: token ids out of range, or placeholders that do not match their contents.
    """
    check_inputs(model.config, inputs)
    graph, state = nnx.split(model)
    embeddings, (cos, sin), trace, hidden, logits = jax.tree.map(np.asarray, _forward(graph, state, inputs))

    def layers(field: str) -> np.ndarray | None:
        parts = [getattr(run, field) for run in trace if getattr(run, field) is not None]
        return np.concatenate(parts).astype(np.int64 if parts[0].dtype.kind == "i" else np.float32) if parts else None

    def per_token(field: str) -> np.ndarray | None:
        stacked = layers(field)
        return None if stacked is None else stacked.reshape(len(stacked), hidden.shape[0] * hidden.shape[1], -1)

    text, local_ids = model.config.text, layers("ids_BTGC")
    if local_ids is not None:
        groups = np.arange(text.router_n_groups)[:, None] * text.experts_per_group
        local_ids = (local_ids + groups).reshape(len(local_ids), hidden.shape[0] * hidden.shape[1], -1)
    residual, attention, mlp = layers("hidden_BTD"), layers("attention_BTD"), layers("mlp_BTD")
    assert residual is not None and attention is not None and mlp is not None
    return Forward(
        embeddings=embeddings.astype(np.float32),
        hidden_states=residual,
        attn_out=attention,
        mlp_out=mlp,
        final_norm=hidden.astype(np.float32),
        logits=logits.astype(np.float32),
        rope_cos=cos,
        rope_sin=sin,
        router_logits=per_token("router_logits_BTE"),
        router_weights=per_token("weights_BTGC"),
        router_indices=local_ids,
    )


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph: nnx.GraphDef, state: Any, inputs: ModelInputs):
    model: InternS1Pro = nnx.merge(graph, state)
    x_BTD = model.embed(inputs)
    out = model.text(x_BTD, inputs.positions, inputs.segment_ids, trace=True)
    return x_BTD, model.text.rotary(inputs.positions), out.trace, out.hidden_BTD, model.text.logits(out.hidden_BTD)


def padding_positions(valid_BT: np.ndarray) -> np.ndarray:
    """The official default positions: 0 .. T-1, padding counted (spec 2.6)."""
    return np.broadcast_to(np.arange(valid_BT.shape[1]), valid_BT.shape)


def true_positions(valid_BT: np.ndarray) -> np.ndarray:
    """Positions from 0 at each row's first token; 0 at padding before it."""
    return np.maximum(np.cumsum(valid_BT, -1) - 1, 0)


def moe_layers(config: TextConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
