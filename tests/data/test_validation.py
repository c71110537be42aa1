"""The ablation changes the medium and nothing else; a prompt is the beginning of a document."""

import dataclasses

import numpy as np
import pytest

from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import Document, SignalPart, TextPart
from interns1pro_jax.data.sources import DocumentList
from interns1pro_jax.data.validation import ablation, prompts
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.tokenizer import base


def labels_of(data):
    labels = np.concatenate([batch.labels.ravel() for batch in data.in_order()])
    return sorted(labels[labels != -100].tolist())


@pytest.mark.parametrize("medium", ["image", "signal"])
def test_only_the_medium_changes(documents, encoder, model, config, medium):
    result = ablation(DocumentList(documents), encoder, model, config, medium)
    assert result.documents > 8
    for data in (result.intact, result.removed, result.swapped):
        assert len(data.sizes) == result.documents
        assert labels_of(data) == labels_of(result.intact)
    # Every caption is there, and nothing before the medium.
    single = [d for d in documents if d.source == medium]
    captions = [t for d in single for t in [*encoder.tokenizer.encode(d.parts[2].text), encoder.tokenizer.special(base.END_OF_TEXT)]]
    if result.documents == len(single):
        assert labels_of(result.intact) == sorted(captions)


def test_an_image_is_greyed_or_another_documents(documents, encoder, model, config):
    images = [d for d in documents if d.source == "image"]
    result = ablation(DocumentList(images), encoder, model, config, "image")
    variants = [list(data.in_order()) for data in (result.intact, result.removed, result.swapped)]
    for intact, removed, swapped in zip(*variants, strict=True):
        for name in ("tokens", "positions", "segment_ids"):
            assert np.array_equal(getattr(intact.inputs, name), getattr(removed.inputs, name))
            assert np.array_equal(getattr(intact.inputs, name), getattr(swapped.inputs, name))
        real = intact.inputs.vision.frame_ids > 0
        assert np.abs(removed.inputs.vision.patches[real]).max() < 0.01
        difference = np.abs(intact.inputs.vision.patches - swapped.inputs.vision.patches).max(-1)
        assert (difference[real] > 0).all()  # the images are random, so none is its own partner
    all_patches = [np.concatenate([b.inputs.vision.patches[b.inputs.vision.frame_ids > 0] for b in v]) for v in variants[::2]]
    assert np.array_equal(*(np.sort(patches.sum(-1)) for patches in all_patches))


def test_a_signal_is_silenced(documents, encoder, model, config):
    result = ablation(DocumentList(documents), encoder, model, config, "signal")
    assert all((batch.inputs.time_series.values == 0).all() for batch in result.removed.in_order())
    assert not any((batch.inputs.time_series.values == 0).all() for batch in result.swapped.in_order() if (batch.labels != -100).any())


@pytest.mark.parametrize("medium", ["image", "signal"])
def test_without_partners_there_is_no_ablation(documents, encoder, model, config, medium):
    assert ablation(DocumentList([d for d in documents if d.source == medium][:1]), encoder, model, config, medium) is None
    assert ablation(DocumentList([d for d in documents if d.source == "text"]), encoder, model, config, medium) is None


def test_a_medium_that_does_not_fit_into_the_partners_row_is_not_swapped(encoder, model, config):
    def document(number, channels):
        samples = np.random.default_rng(number).normal(size=(40, channels)).astype(np.float32)
        return Document((SignalPart(samples, 10.0, "V"), TextPart(f"{number}")), "signal", "CC0-1.0", str(number))

    row = dataclasses.replace(config.row, samples=encoder.tokenize(document(0, 2)).size.samples)
    data = DocumentList([document(number, channels) for number, channels in enumerate((1, 2, 1, 9))])
    result = ablation(data, encoder, model, dataclasses.replace(config, row=row), "signal")
    assert 0 < result.documents < 3
    assert labels_of(result.intact) == labels_of(result.removed) == labels_of(result.swapped)


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
