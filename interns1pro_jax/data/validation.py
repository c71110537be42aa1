"""Does the model look? The loss on captions with their medium in place, without it, and with that of another document."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.encoding import DocumentEncoder, Tokens
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import AssembledRow, DocumentSource, PackedData, PipelineConfig, collate
from interns1pro_jax.data.records import Document, ImagePart, SignalPart
from interns1pro_jax.data.sources import DocumentList
from interns1pro_jax.models.inputs import ModelInputs

MEDIA = {"image": ImagePart, "signal": SignalPart}
_GREY = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation:
    """The same documents three times; the labels are the text after the medium. Batches are made when they are asked for (`in_order`).

    Attributes:
      intact: as they are.
      removed: a grey image, or a signal of zeros, in the medium's place.
      swapped: the medium of another document that has as many placeholders.
      documents: how many there are.
    """

    intact: PackedData
    removed: PackedData
    swapped: PackedData
    documents: int


def ablation(source: DocumentSource, encoder: DocumentEncoder, model: ModelConfig, config: PipelineConfig, medium: str) -> Ablation | None:
    """The ablation of all documents with one `medium` ("image" or "signal"). What follows the medium can only be told from it and from
    the text before it, so a model that uses it must be worse without it.

    Documents without a partner of the same number of placeholders are left out of all three, and so is a document whose row the
    partner's medium would not fit into. None if no document is left.
    """
    documents = [source[index] for index in range(len(source))]
    pairs = list(_partners([d for d in documents if sum(isinstance(p, MEDIA[medium]) for p in d.parts) == 1], encoder))
    triples = [
        (document, _with_medium(document, medium, _blank(document, medium)), _with_medium(document, medium, _medium(other, medium)))
        for document, other in pairs
    ]
    triples = [triple for triple in triples if not any(encoder.tokenize(each).size.misfit(config.row) for each in triple)]
    if not triples:
        return None
    intact, removed, swapped = (
        PackedData(DocumentList(changed), encoder, model, config, caption_labels) for changed in zip(*triples, strict=True)
    )
    return Ablation(intact, removed, swapped, len(triples))


def caption_labels(tokens: Tokens) -> Int[np.ndarray, " tokens"]:
    """Labels of the text after a medium only."""
    return tokens.labels(np.cumsum(~tokens.is_text) > 0)


def _partners(documents: Sequence[Document], encoder: DocumentEncoder) -> Iterator[tuple[Document, Document]]:
    """Each document with another one whose medium has as many placeholders, and most likely another caption: documents are
    sorted by caption, and partners stand half of the list apart."""
    groups: dict[int, list[tuple[bytes, str, Document]]] = defaultdict(list)
    for document in documents:
        tokens = encoder.tokenize(document)
        caption = tokens.ids[np.cumsum(~tokens.is_text) > 0]
        groups[int((~tokens.is_text).sum())].append((caption.tobytes(), document.name, document))
    for _, group in sorted(groups.items()):
        ordered = [document for _, _, document in sorted(group, key=lambda entry: entry[:2])]
        half = len(ordered) // 2
        yield from zip(ordered, ordered[half:] + ordered[:half], strict=True) if half else ()


def _medium(document: Document, medium: str) -> ImagePart | SignalPart:
    return next(part for part in document.parts if isinstance(part, ImagePart | SignalPart) and isinstance(part, MEDIA[medium]))


def _blank(document: Document, medium: str) -> ImagePart | SignalPart:
    match _medium(document, medium):
        case ImagePart(pixels):
            return ImagePart(np.full_like(pixels, _GREY))
        case SignalPart(samples, rate, unit):
            return SignalPart(np.zeros_like(samples), rate, unit)


def _with_medium(document: Document, medium: str, new: ImagePart | SignalPart) -> Document:
    return dataclasses.replace(document, parts=tuple(new if isinstance(part, MEDIA[medium]) else part for part in document.parts))


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Beginnings of documents for a model to continue.

    Attributes:
      inputs: one prompt per row, padded at the right.
      documents: where they come from.
      shown: the text of each prompt; placeholders appear under their names.
      references: how each document goes on.
    """

    inputs: ModelInputs
    documents: list[Document]
    shown: list[str]
    references: list[str]


def prompts(
    documents: Sequence[Document],
    encoder: DocumentEncoder,
    model: ModelConfig,
    row: RowSize,
    text_tokens: int = 32,
    reference_tokens: int = 64,
) -> Prompts:
    """A prompt of each document: up to the end of its first medium, or its first `text_tokens` tokens where it has none.

    Args:
      row: its media sizes bound a prompt's; the prompts are padded to its `tokens`.
    """
    rows, shown, references = [], [], []
    for document in documents:
        tokens = encoder.tokenize(document)
        media = np.flatnonzero(~tokens.is_text)
        gaps = np.flatnonzero(np.diff(media) > 1)
        stop = min(text_tokens, row.tokens, len(tokens.ids)) if not media.size else int(media[gaps[0]] if gaps.size else media[-1]) + 1
        assembled = AssembledRow.empty(row.tokens)
        assembled.put(0, tokens.ids[:stop], tokens.labels()[:stop], segment=1)
        first = next((part for part in document.parts if isinstance(part, ImagePart | SignalPart)), None)
        match first:
            case ImagePart():
                assembled.images.append(encoder.images(document)[0])
            case SignalPart():
                assembled.signals.append(tokens.signals[0])
        rows.append(assembled)
        shown.append(encoder.tokenizer.decode(tokens.ids[:stop].tolist()))
        references.append(encoder.tokenizer.decode(tokens.ids[stop : stop + reference_tokens].tolist()))
    return Prompts(collate(rows, row, model).inputs, list(documents), shown, references)
