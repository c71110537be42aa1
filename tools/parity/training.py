"""Checks of losses and gradients."""

from __future__ import annotations

import dataclasses
import functools
import re
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
from tools.parity.subject import Subject, hf_tensors, moe_layers, padding_positions

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
        total, count = cross_entropy(out.hidden_BTD, model.text.head_DV, shifted_BT)
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
    losses = _Losses(subject, golden, float(golden.get("router_aux_loss_coef", _aux_coef(subject))))
    losses.compare(golden)
    numbers = sorted({int(match[1]) for name in golden if (match := re.fullmatch(r"router_grad(?:_with_aux)?\.layer(\d+)", name))})
    moe = moe_layers(subject.config.text)
    layers = dict(zip(numbers, numbers, strict=True)) if set(numbers) <= set(moe) else dict(enumerate(moe))
    for name in golden:
        kind, _, tensor = name.partition(".")
        if kind == "grad":
            golden.compare(name, losses.gradients("").tensors[tensor])
        elif kind in ("router_grad", "router_grad_with_aux"):
            router = _ROUTER.format(layers[int(tensor.removeprefix("layer"))])
            golden.compare(name, losses.gradients("", with_aux=kind.endswith("_with_aux")).tensors[router])


def check_gradient_norms(golden: Golden, subject: Subject) -> None:
    """Norms of every parameter's gradient, of the batches in `train.npz`, or else of the rows in `text_ragged.npz`.

    Sections are `text`, `multimodal`, and these `_with_aux_*`: of the loss with the auxiliary loss.
    """
    patterns = ("train.npz", "text_ragged.npz", "train*.npz", "text*.npz")
    source = next((path for pattern in patterns for path in sorted(subject.directory.rglob(pattern))), None)
    if source is None:
        raise FileNotFoundError(f"no train.npz or text_ragged.npz in {subject.directory.name} holds the batch")
    losses = _Losses(subject, Golden.open(source, source.name), float(golden.get("router_aux_loss_coef", _aux_coef(subject))))
    losses.compare(golden)
    for name in golden:
        section, _, tensor = name.partition("/")
        if not tensor or not section.startswith(("text", "multimodal")):
            continue
        prefix = "mm_" if section.startswith("multimodal") else ""
        ours = losses.gradients(prefix, with_aux="_with_aux" in section).tensors
        if tensor in ours:
            norm = np.linalg.norm(ours[tensor].astype(np.float64).ravel())
            golden.compare(name, norm, GRADIENT_NORM, relative=True)
        elif tensor in subject.stored:  # a buffer: it has no gradient
            golden.equal(name, 0.0)


class _Losses:
    """Gradients of a file's batches, each computed when first needed. Batches are named by the prefix of their arrays: "", "mm_".

    Args:
      arrays: the file with the batches.
      coef: weight of the auxiliary loss.
    """

    def __init__(self, subject: Subject, arrays: Golden, coef: float):
        self.subject, self.arrays, self.coef = subject, arrays, coef
        self._computed: dict[tuple[str, bool], Gradients] = {}

    def gradients(self, prefix: str, with_aux: bool = False) -> Gradients:
        key = prefix, with_aux
        if key not in self._computed:
            batch = TrainingBatch.read(self.arrays, prefix)
            self._computed[key] = gradients(self.subject, batch, self.coef if with_aux else 0.0)
        return self._computed[key]

    def compare(self, golden: Golden) -> None:
        """Compares the losses of every batch."""
        for prefix in ("", "mm_"):
            if prefix + "input_ids" in self.arrays:
                ours = self.gradients(prefix)
                golden.compare(prefix + "loss", ours.loss)
                golden.compare(prefix + "aux_loss", ours.aux_loss)
                golden.compare(prefix + "loss_with_aux", ours.loss + self.coef * ours.aux_loss)
