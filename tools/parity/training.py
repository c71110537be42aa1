"""Checks of losses and gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import InternS1Pro, check_inputs
from interns1pro_jax.ops.losses import IGNORED, cross_entropy
from interns1pro_jax.ops.router_losses import global_topk_balance_loss
from tools.parity.golden import GRADIENT_NORM, Golden
from tools.parity.media import Media, model_inputs, read_media
from tools.parity.subject import Subject, hf_tensors, padding_positions

_ROUTER = "model.language_model.layers.{}.mlp.gate.weight"


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Losses of one batch, and the gradients under the released names."""

    loss: float
    aux_loss: float
    tensors: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnames="graph")
def _gradients(graph: nnx.GraphDef, params: Any, rest: Any, inputs: ModelInputs, labels_BT: jax.Array, aux_coef: jax.Array):
    """(loss + aux_coef * aux_loss, (loss, aux_loss)) and the gradients of the sum."""

    def losses(params: Any):
        model: InternS1Pro = nnx.merge(graph, params, rest)
        out = model(inputs, trace=True)
        shifted_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        total, count = cross_entropy(out.hidden_BTD, model.text.lm_head_DV[...], shifted_BT)
        assert out.trace is not None
        logits = [run.router_logits_BTE for run in out.trace if run.router_logits_BTE is not None]
        aux = jnp.float32(0)
        if logits:
            logits_LNE = jnp.concatenate(logits).reshape(-1, labels_BT.size, model.config.text.num_experts)
            aux = global_topk_balance_loss(logits_LNE, inputs.segment_ids.reshape(-1) > 0, model.config.text.num_experts_per_tok)
        return total / count + aux_coef * aux, (total / count, aux)

    return jax.value_and_grad(losses, has_aux=True)(params)


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Rows with labels (-100: ignored; not yet shifted) and media."""

    tokens_BT: np.ndarray
    valid_BT: np.ndarray
    labels_BT: np.ndarray
    media: Media

    @classmethod
    def read(cls, golden: Golden, prefix: str = "") -> TrainingBatch:
        """The batch of a golden file; without `labels`, every valid token is one."""
        tokens = golden.input(prefix + "input_ids")
        valid = golden.get(prefix + "attention_mask", np.ones_like(tokens)) > 0
        labels = golden.get(prefix + "labels", np.where(valid, tokens, IGNORED))
        return cls(tokens, valid, labels, read_media(golden, prefix))


def gradients(subject: Subject, batch: TrainingBatch, aux_coef: float = 0.0) -> Gradients:
    """Losses and gradients as the official code has them: its router's backward goes through the chosen experts only."""
    inputs = model_inputs(subject.config, batch.tokens_BT, batch.valid_BT, padding_positions(batch.valid_BT), batch.media)
    check_inputs(subject.config, inputs)
    config = subject.model.config
    router = dataclasses.replace(config.text.router, straight_through=False)
    plain = dataclasses.replace(config, text=dataclasses.replace(config.text, router=router))
    graph = nnx.graphdef(nnx.eval_shape(lambda: InternS1Pro(plain, rngs=nnx.Rngs(0))))
    params, rest = nnx.state(subject.model, nnx.Param), nnx.state(subject.model, nnx.Not(nnx.Param))
    (_, (loss, aux)), grads = _gradients(graph, params, rest, inputs, jnp.asarray(batch.labels_BT, jnp.int32), jnp.float32(aux_coef))
    return Gradients(float(loss), float(aux), hf_tensors(hf_parameters(subject.config), grads))


def _aux_coef(subject: Subject) -> float:
    """The weight of the official auxiliary loss, which sums over the chosen experts where ours is a mean (`RouterConfig`)."""
    text = subject.config.text
    return text.router.balance_coef / max(text.num_experts_per_tok, 1)


def check_train(golden: Golden, subject: Subject) -> None:
    """Losses, and full gradients of routers and of some other parameters; `mm_*` is a batch with images."""
    coef = _aux_coef(subject)
    batch = TrainingBatch.read(golden)
    plain = gradients(subject, batch)
    golden.compare("loss", plain.loss)
    golden.compare("aux_loss", plain.aux_loss)
    golden.compare("loss_with_aux", plain.loss + coef * plain.aux_loss)
    balanced: Gradients | None = None
    for name in golden:
        kind, _, tensor = name.partition(".")
        if kind == "grad":
            golden.compare(name, plain.tensors[tensor])
        elif kind == "router_grad":
            golden.compare(name, plain.tensors[_ROUTER.format(tensor.removeprefix("layer"))])
        elif kind == "router_grad_with_aux":
            balanced = balanced or gradients(subject, batch, coef)
            golden.compare(name, balanced.tensors[_ROUTER.format(tensor.removeprefix("layer"))])
    if "mm_input_ids" in golden:
        golden.compare("mm_loss", gradients(subject, TrainingBatch.read(golden, "mm_")).loss)


def check_gradient_norms(golden: Golden, subject: Subject) -> None:
    """Norms of every parameter's gradient, of the batches in `train.npz`, or else of the rows in `text_ragged.npz`."""
    directory = subject.directory
    source = directory / "train.npz" if (directory / "train.npz").is_file() else directory / "text_ragged.npz"
    arrays = Golden.open(source, source.name)
    batch = TrainingBatch.read(arrays)
    coef = float(golden.get("router_aux_loss_coef", _aux_coef(subject)))
    plain = gradients(subject, batch)
    golden.compare("loss", plain.loss)
    golden.compare("aux_loss", plain.aux_loss)
    golden.compare("loss_with_aux", plain.loss + coef * plain.aux_loss)
    _compare_norms(golden, "text/", plain)
    if any(name.startswith("text_with_aux_router/") for name in golden):
        _compare_norms(golden, "text_with_aux_router/", gradients(subject, batch, coef))
    if "mm_input_ids" in arrays:
        multimodal = gradients(subject, TrainingBatch.read(arrays, "mm_"))
        golden.compare("mm_loss", multimodal.loss)
        _compare_norms(golden, "multimodal/", multimodal)


def _compare_norms(golden: Golden, prefix: str, ours: Gradients) -> None:
    for name in list(golden):
        tensor = name.removeprefix(prefix)
        if name.startswith(prefix) and tensor in ours.tensors:
            norm = np.linalg.norm(ours.tensors[tensor].astype(np.float64).ravel())
            golden.compare(name, norm, GRADIENT_NORM, relative=True)
