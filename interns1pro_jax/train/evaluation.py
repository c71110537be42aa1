"""Evaluation of a run on held-out documents: the loss of all, of every source and of every kind of document."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

import numpy as np
from flax import nnx
from jaxtyping import Int

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.examples import Example
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.validation import PackedExamples
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.state import TrainState
from interns1pro_jax.train.step import make_eval_step

GroupedBatch = tuple[Batch, Int[np.ndarray, "B T"]]


@dataclasses.dataclass(frozen=True)
class GroupLoss:
    """Mean loss of some documents in nats per token, and the tokens."""

    loss: float
    tokens: int


def kind_of(example: Example) -> str:
    """What a document shows beside text: `text` alone, `image` (videos, too), `signal`, or `image and signal`."""
    shown = [name for name, size in (("image", example.size.patches), ("signal", example.size.samples)) if size]
    return " and ".join(shown) or "text"


class HeldOutLoss:
    """Losses on held-out documents, by `all`, `source/...` and `kind/...`.

    Args:
      graphdef: of the model whose states are evaluated.
      documents: by source.
      batches: how many of them an evaluation during training reads.

    Attributes:
      data: the documents in rows.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        documents: Mapping[str, Sequence[Example]],
        model: ModelConfig,
        pipeline: PipelineConfig,
        batches: int,
    ):
        names = _short_names(list(documents))
        owners = [(names[source], kind_of(example)) for source, examples in documents.items() for example in examples]
        self._owners = sorted(set(owners))
        groups = [self._owners.index(owner) for owner in owners]
        examples = [example for examples in documents.values() for example in examples]
        self.data = PackedExamples(examples, model, pipeline, groups=groups)
        self.some: list[GroupedBatch] = list(itertools.islice(self.data.in_order(), batches))
        self._step = make_eval_step(graphdef, len(self._owners))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Scalars for the records of a run, from some of the documents. `loss` is that of all sources together."""
        found = self.losses(state, self.some)
        return {"loss": found.pop("all").loss} | {name: group.loss for name, group in found.items()}

    def losses(self, state: TrainState, batches: Iterable[GroupedBatch]) -> dict[str, GroupLoss]:
        """Losses of the documents in `batches`; groups without a token are left out."""
        sums, counts = np.zeros(len(self._owners)), np.zeros(len(self._owners), np.int64)
        for batch, groups_BT in batches:
            losses_G, counts_G = self._step(state, *place_batch((batch, groups_BT)))
            sums += np.asarray(losses_G, np.float64)
            counts += np.asarray(counts_G)
        parts = {"all": np.ones(len(self._owners), bool)}
        for place, what in enumerate(("source", "kind")):
            for name in sorted({owner[place] for owner in self._owners}):
                parts[f"{what}/{name}"] = np.array([owner[place] == name for owner in self._owners])
        return {
            name: GroupLoss(float(sums[mine].sum() / max(counts[mine].sum(), 1)), int(counts[mine].sum()))
            for name, mine in parts.items()
            if name == "all" or counts[mine].any()
        }


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Last parts of paths, where they tell the sources apart."""
    last = {source: PurePath(source).name for source in sources}
    return last if len(set(last.values())) == len(sources) else {source: source for source in sources}
