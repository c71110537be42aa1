"""The ablation changes the medium and nothing else; a prompt is the beginning of a document."""

import dataclasses

import numpy as np
import pytest

from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import Document, TextPart
from interns1pro_jax.data.sources import DocumentList
from interns1pro_jax.data.validation import ablation, prompts
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.tokenizer import base


def labels_of(batches):
    labels = np.concatenate([batch.labels.ravel() for batch in batches])
    return sorted(labels[labels != -100].tolist())


@pytest.mark.parametrize("medium", ["image", "signal"])
def test_only_the_medium_changes(documents, encoder, model, config, medium):
    result = ablation(DocumentList(documents), encoder, model, config, medium)
    assert result.documents > 8
    for batches in (result.intact, result.removed, result.swapped):
        for batch in batches:
            check_inputs(model, batch.inputs)
        assert labels_of(batches) == labels_of(result.intact)
    # Every caption is there, and nothing before the medium.
    single = [d for d in documents if d.source == medium]
    captions = [t for d in single for t in [*encoder.tokenizer.encode(d.parts[2].text), encoder.tokenizer.special(base.END_OF_TEXT)]]
    if result.documents == len(single):
        assert labels_of(result.intact) == sorted(captions)


def test_an_image_is_greyed_or_another_documents(documents, encoder, model, config):
    images = [d for d in documents if d.source == "image"]
    result = ablation(DocumentList(images), encoder, model, config, "image")
    for intact, removed, swapped in zip(result.intact, result.removed, result.swapped, strict=True):
        for name in ("tokens", "positions", "segment_ids"):
            assert np.array_equal(getattr(intact.inputs, name), getattr(removed.inputs, name))
            assert np.array_equal(getattr(intact.inputs, name), getattr(swapped.inputs, name))
        real = intact.inputs.vision.frame_ids > 0
        assert np.abs(removed.inputs.vision.patches[real]).max() < 0.01
        difference = np.abs(intact.inputs.vision.patches - swapped.inputs.vision.patches).max(-1)
        assert (difference[real] > 0).all()  # the images are random, so none is its own partner
    all_patches = [
        np.concatenate([b.inputs.vision.patches[b.inputs.vision.frame_ids > 0] for b in v]) for v in (result.intact, result.swapped)
    ]
    assert np.array_equal(*(np.sort(patches.sum(-1)) for patches in all_patches))


def test_a_signal_is_silenced(documents, encoder, model, config):
    result = ablation(DocumentList(documents), encoder, model, config, "signal")
    assert all((batch.inputs.time_series.values == 0).all() for batch in result.removed)
    assert not any((batch.inputs.time_series.values == 0).all() for batch in result.swapped if (batch.labels != -100).any())


def test_documents_without_a_partner_are_an_error(documents, encoder, model, config):
    with pytest.raises(ValueError, match="no two of 1 documents with one image"):
        ablation(DocumentList([d for d in documents if d.source == "image"][:1]), encoder, model, config, "image")


def test_a_prompt_and_its_reference_are_the_document(documents, encoder, model, config, tokenizer):
    chosen = [documents[i] for i in (0, 20, 32, 44, 48)]
    row = dataclasses.replace(config.row, tokens=96)
    result = prompts(chosen, encoder, model, row, text_tokens=5, reference_tokens=10**6)
    check_inputs(model, result.inputs)
    assert result.inputs.tokens.shape == (5, 96)
    for number, document in enumerate(chosen):
        assert result.shown[number] + result.references[number] == tokenizer.decode(encoder.tokenize(document).ids.tolist())
        length = (result.inputs.segment_ids[number] > 0).sum()
        assert tokenizer.decode(result.inputs.tokens[number, :length].tolist()) == result.shown[number]
    assert len(tokenizer.encode(result.shown[0])) == 5
    assert result.shown[1].endswith(base.VISION_END) and result.shown[2].endswith(base.SIGNAL_END)
    # With two media the prompt ends after the first.
    assert result.shown[3].endswith(base.SIGNAL_END) and base.IMAGE in result.references[3]


def test_a_text_only_prompt_needs_no_media(encoder, model):
    document = Document((TextPart("the wave of energy"),), "made", "CC0-1.0", "1")
    result = prompts([document], encoder, model, RowSize(8), text_tokens=2)
    assert result.inputs.vision is None and result.inputs.time_series is None
