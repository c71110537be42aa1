"""The ablation changes the medium and nothing else; a prompt is the beginning of a document."""

import dataclasses

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import DataError, Document, SignalPart, TextPart
from interns1pro_jax.data.unigram import unigram_loss
from interns1pro_jax.data.validation import PackedExamples, ablation, prompts
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.tokenizer import base


def labels_of(data):
    labels = np.concatenate([batch.labels.ravel() for batch, _ in data.in_order()])
    return sorted(labels[labels != -100].tolist())


@pytest.mark.parametrize("medium", ["image", "signal"])
def test_only_the_medium_changes(examples, documents, encoder, model, config, medium):
    result = ablation(examples, model, config, medium)
    assert result.documents > 8
    for data in (result.intact, result.removed, result.swapped):
        assert len(data.examples) == result.documents
        assert labels_of(data) == labels_of(result.intact)
    # Every caption is there, and nothing before the medium.
    single = [d for d in documents if d.source == medium]
    captions = [t for d in single for t in [*encoder.tokenizer.encode(d.parts[2].text), encoder.tokenizer.special(base.END_OF_TEXT)]]
    if result.documents == len(single):
        assert labels_of(result.intact) == sorted(captions)


def test_an_image_is_greyed_or_another_documents(examples, model, config):
    images = [example for example in examples if example.name.startswith("image")]
    result = ablation(images, model, config, "image")
    variants = [[batch for batch, _ in data.in_order()] for data in (result.intact, result.removed, result.swapped)]
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


def test_a_signal_is_silenced(examples, model, config):
    result = ablation(examples, model, config, "signal")
    assert all((batch.inputs.time_series.values == 0).all() for batch, _ in result.removed.in_order())
    assert not any((batch.inputs.time_series.values == 0).all() for batch, _ in result.swapped.in_order() if (batch.labels != -100).any())


@pytest.mark.parametrize("medium", ["image", "signal"])
def test_without_partners_there_is_no_ablation(examples, model, config, medium):
    assert ablation([e for e in examples if e.name.startswith(medium)][:1], model, config, medium) is None
    assert ablation([e for e in examples if e.name.startswith("text")], model, config, medium) is None


def test_a_medium_that_does_not_fit_into_the_partners_row_is_not_swapped(encoder, model, config):
    def document(number, channels):
        samples = np.random.default_rng(number).normal(size=(40, channels)).astype(np.float32)
        return Document((SignalPart(samples, 10.0, "V"), TextPart(f"{number}")), "signal", "CC0-1.0", str(number))

    row = dataclasses.replace(config.row, samples=encoder.encode(document(0, 2)).size.samples)
    data = [encoder.encode(document(number, channels)) for number, channels in enumerate((1, 2, 1, 9))]
    result = ablation(data, model, dataclasses.replace(config, row=row), "signal")
    assert 0 < result.documents < 3
    assert labels_of(result.intact) == labels_of(result.removed) == labels_of(result.swapped)


def test_a_prompt_and_its_reference_are_the_document(examples, model, config, tokenizer):
    chosen = [examples[i] for i in (0, 20, 32, 44, 48)]
    row = dataclasses.replace(config.row, tokens=96)
    result = prompts(chosen, tokenizer, model, row, text_tokens=5, reference_tokens=10**6)
    check_inputs(model, result.inputs)
    assert result.inputs.tokens.shape == (5, 96)
    for number, example in enumerate(chosen):
        assert result.shown[number] + result.references[number] == tokenizer.decode(example.ids.tolist())
        length = (result.inputs.segment_ids[number] > 0).sum()
        assert tokenizer.decode(result.inputs.tokens[number, :length].tolist()) == result.shown[number]
    assert len(tokenizer.encode(result.shown[0])) == 5
    assert result.shown[1].endswith(base.VISION_END) and result.shown[2].endswith(base.SIGNAL_END)
    # With two media the prompt ends after the first.
    assert result.shown[3].endswith(base.SIGNAL_END) and base.IMAGE in result.references[3]


def test_a_text_only_prompt_needs_no_media(encoder, model):
    document = Document((TextPart("the wave of energy"),), "made", "CC0-1.0", "1")
    result = prompts([encoder.encode(document)], encoder.tokenizer, model, RowSize(8), text_tokens=2)
    assert result.inputs.vision is None and result.inputs.time_series is None


def test_every_label_is_counted_once(examples, model, config):
    data = PackedExamples(examples, model, config)
    assert not data.left_out and np.array_equal(np.bincount(labels_of(data), minlength=336), data.label_counts)


def test_what_does_not_fit_is_named(examples, model, config):
    narrow = dataclasses.replace(config, row=dataclasses.replace(config.row, samples=100))
    left_out = PackedExamples(examples, model, narrow).left_out
    assert left_out and all("too large for a row" in reason for reason in left_out.values())
    with pytest.raises(DataError, match="none of 0 documents fits"):
        PackedExamples([], model, config)
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=300))
    with pytest.raises(ConfigError, match="vocab_size=300 is too small"):
        PackedExamples(examples, small, config)


def test_unigram_loss_is_the_mean_over_labels():
    train, held_out = np.array([5, 0, 3, 0]), np.array([2, 1, 0, 0])
    p = np.array([6, 1, 4, 1]) / 12
    labels = [0, 0, 1]
    assert unigram_loss(train, held_out) == pytest.approx(-np.mean([np.log(p[label]) for label in labels]))
    uniform = np.full(8, 10**9)
    assert unigram_loss(uniform, np.ones(8, int)) == pytest.approx(np.log(8))
    with pytest.raises(ValueError, match="no held-out labels"):
        unigram_loss(train, np.zeros(4, int))
    with pytest.raises(ValueError, match="counts of 4 and 8"):
        unigram_loss(train, uniform)
