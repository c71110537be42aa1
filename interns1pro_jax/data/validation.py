"""Does the model look? The loss on captions with their medium in place, without it, and with that of another document."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.examples import Example, StoredImage, StoredSignal, png
from interns1pro_jax.data.packing import COLUMNS, RowSize, misfits, plan_rows
from interns1pro_jax.data.pipeline import AssembledRow, collate, row_of_examples
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.records import DataError
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.time_series_inputs import required_sizes
from interns1pro_jax.ops.losses import IGNORED
from interns1pro_jax.tokenizer.base import Tokenizer

MEDIA = {"image": StoredImage, "signal": StoredSignal}
_GREY = 128


class PackedExamples:
    """A few documents in memory as rows and batches, for evaluation.

    Args:
      labels: which tokens of a document are labels.
      groups: a number for each document, for losses of some of them; 0 for all where there are none.

    Attributes:
      examples, groups: those that fit into a row.
      left_out: why the others do not, by name.
      label_counts: how often each token is a label [V], for `unigram`.

    Raises:
      DataError: no document fits.
      ConfigError: the vocabulary of the model is too small.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        model: ModelConfig,
        config: PipelineConfig,
        labels: Callable[[Example], Int[np.ndarray, " tokens"]] = Example.labels,
        groups: Sequence[int] | None = None,
    ):
        self._model, self._config, self._labels = model, config, labels
        sizes = np.array([example.size.as_array() for example in examples], np.int64).reshape(-1, len(COLUMNS))
        bad = set(misfits(sizes, config.row).tolist())
        self.left_out = {examples[index].name: str(examples[index].size.misfit(config.row)) for index in sorted(bad)}
        self.examples = [example for index, example in enumerate(examples) if index not in bad]
        self.groups = np.delete(np.zeros(len(examples), np.int32) if groups is None else np.asarray(groups, np.int32), sorted(bad))
        if not self.examples:
            raise DataError(f"none of {len(examples)} documents fits into {config.row}; make rows larger or prepare other data.")
        if (largest := max(int(example.ids.max()) for example in self.examples)) >= model.text.vocab_size:
            raise ConfigError(f"the documents have token {largest}, the model's vocab_size={model.text.vocab_size} is too small for it.")
        order = np.random.default_rng(config.seed).permutation(len(self.examples))
        self.plan = plan_rows(np.delete(sizes, sorted(bad), axis=0), config.row, order)
        self.label_counts = np.zeros(model.text.vocab_size, np.int64)
        for example in self.examples:
            counted = labels(example)
            self.label_counts += np.bincount(counted[counted != IGNORED], minlength=len(self.label_counts))

    def in_order(self) -> Iterator[tuple[Batch, Int[np.ndarray, "B T"]]]:
        """Every row once, with the group of each position; the last batch is filled up with empty rows. A batch is made when it is asked
        for."""
        size, length = self._config.batch_size, self._config.row.tokens
        # In random order, so that the first few batches are a fair sample.
        numbers = np.random.default_rng(self._config.seed).permutation(len(self.plan)).tolist()
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            groups_BT = np.zeros((size, length), np.int32)
            for row, number in enumerate(chosen):
                pieces = self.plan.row(number)
                of_row = np.repeat(self.groups[self.plan.document[pieces]], (self.plan.stop - self.plan.start)[pieces])
                groups_BT[row, : len(of_row)] = of_row
            rows = [self._row(number) for number in chosen]
            yield collate(rows + [AssembledRow.empty(length)] * (size - len(rows)), self._config.row, self._model), groups_BT

    def _row(self, number: int) -> AssembledRow:
        row, start = AssembledRow.empty(self._config.row.tokens), 0
        pieces = self.plan.row(number)
        documents, begins, ends = (x[pieces].tolist() for x in (self.plan.document, self.plan.start, self.plan.stop))
        for segment, (document, begin, end) in enumerate(zip(documents, begins, ends, strict=True), start=1):
            example = self.examples[document]
            row.put(start, example.ids[begin:end], self._labels(example)[begin:end], segment)
            row.put_media(example.media, self._model)
            start += end - begin
        return row


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation:
    """The same documents three times; the labels are the text after the medium. Batches are made when they are asked for (`in_order`).

    Attributes:
      intact: as they are.
      removed: a grey image, or a signal of zeros, in the medium's place.
      swapped: the medium of another document that has as many placeholders.
      documents: how many there are.
    """

    intact: PackedExamples
    removed: PackedExamples
    swapped: PackedExamples
    documents: int


def ablation(examples: Sequence[Example], model: ModelConfig, config: PipelineConfig, medium: str) -> Ablation | None:
    """The ablation of all documents with one `medium` ("image" or "signal"). What follows the medium can only be told from it and from
    the text before it, so a model that uses it must be worse without it.

    Documents without a partner of the same number of placeholders are left out of all three, and so is a document whose row the
    partner's medium would not fit into. None if no document is left.
    """
    with_one = [example for example in examples if sum(isinstance(m, MEDIA[medium]) for m in example.media) == 1]
    placeholder = model.image_token_id if medium == "image" else model.ts_token_id
    triples = [
        (example, _with_medium(example, medium, _blank(example, medium, model)), _with_medium(example, medium, _medium(other, medium)))
        for example, other in _partners(with_one, placeholder)
    ]
    triples = [triple for triple in triples if not any(each.size.misfit(config.row) for each in triple)]
    if not triples:
        return None

    def caption_labels(example: Example) -> Int[np.ndarray, " tokens"]:
        return example.labels(np.cumsum(example.ids == placeholder) > 0)

    intact, removed, swapped = (PackedExamples(changed, model, config, caption_labels) for changed in zip(*triples, strict=True))
    return Ablation(intact, removed, swapped, len(triples))


def _partners(examples: Sequence[Example], placeholder: int) -> Iterator[tuple[Example, Example]]:
    """Each document with another one whose medium has as many placeholders, and most likely another caption: documents are
    sorted by caption, and partners stand half of the list apart."""
    groups: dict[int, list[tuple[bytes, str, Example]]] = defaultdict(list)
    for example in examples:
        places = example.ids == placeholder
        caption = example.ids[np.cumsum(places) > 0]
        groups[int(places.sum())].append((caption.tobytes(), example.name, example))
    for _, group in sorted(groups.items()):
        ordered = [example for _, _, example in sorted(group, key=lambda entry: entry[:2])]
        half = len(ordered) // 2
        yield from zip(ordered, ordered[half:] + ordered[:half], strict=True) if half else ()


def _medium(example: Example, medium: str) -> StoredImage | StoredSignal:
    return next(m for m in example.media if isinstance(m, StoredImage | StoredSignal) and isinstance(m, MEDIA[medium]))


def _blank(example: Example, medium: str, model: ModelConfig) -> StoredImage | StoredSignal:
    match _medium(example, medium):
        case StoredImage(_, grid):
            assert model.vision is not None
            height, width = (count * model.vision.patch_size for count in grid[1:])
            return StoredImage(png(np.full((height, width, 3), _GREY, np.uint8)), grid)
        case StoredSignal(samples, rate):
            return StoredSignal(np.zeros_like(samples), rate)


def _with_medium(example: Example, medium: str, new: StoredImage | StoredSignal) -> Example:
    """The document with another medium of as many placeholders; a signal of more channels needs more room."""
    media = tuple(new if isinstance(m, MEDIA[medium]) else m for m in example.media)
    needed = required_sizes([[m.signal() for m in media if isinstance(m, StoredSignal)]])
    size = RowSize(len(example.ids), example.size.patches, needed.values, needed.rows, needed.pairs, needed.patch_width)
    return dataclasses.replace(example, media=media, size=size)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Beginnings of documents for a model to continue.

    Attributes:
      inputs: one prompt per row, padded at the right.
      names: where they come from.
      shown: the text of each prompt; placeholders appear under their names.
      references: how each document goes on.
    """

    inputs: ModelInputs
    names: list[str]
    shown: list[str]
    references: list[str]


def prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    model: ModelConfig,
    row: RowSize,
    text_tokens: int = 32,
    reference_tokens: int = 64,
) -> Prompts:
    """A prompt of each document: up to where what it is not trained to write ends (its first medium, or a question), or its first
    `text_tokens` tokens where it is trained to write all.

    Args:
      row: its media sizes bound a prompt's; the prompts are padded to its `tokens`.
    """
    rows, shown, references = [], [], []
    for example in examples:
        given = np.flatnonzero(~example.trained)
        gaps = np.flatnonzero(np.diff(given) > 1)
        end = text_tokens if not given.size else int(given[gaps[0]] if gaps.size else given[-1]) + 1
        stop = min(end, row.tokens, len(example.ids))
        media = example.media[:1] if given.size else ()
        prompt = dataclasses.replace(example, ids=example.ids[:stop], trained=example.trained[:stop], media=media)
        rows.append(row_of_examples([prompt], row.tokens, model))
        shown.append(tokenizer.decode(example.ids[:stop].tolist()))
        references.append(tokenizer.decode(example.ids[stop : stop + reference_tokens].tolist()))
    return Prompts(collate(rows, row, model).inputs, [example.name for example in examples], shown, references)
