"""Laws of batches: packing changes nothing about a document, batch k depends on k alone, nothing is lost or silently dropped."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data import records
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import AssembledRow, PackedData, collate
from interns1pro_jax.data.records import DataError, Document, SignalPart, TextPart
from interns1pro_jax.data.sources import DocumentList, RecordSource
from interns1pro_jax.data.unigram import unigram_loss
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.models.time_series_inputs import MAX_SAMPLES, pack_time_series, tokens_of
from interns1pro_jax.models.vision_inputs import pack_vision
from interns1pro_jax.tokenizer import base


@pytest.fixture(scope="module")
def data(documents, encoder, model, config):
    return PackedData(DocumentList(documents), encoder, model, config)


def rows_of(batches):
    """Each row of the batches as bytes of its tokens."""
    return [row.tobytes() for batch in batches for row in batch.inputs.tokens]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_document_is_tokens_placeholders_and_an_end(encoder, tokenizer, documents):
    for document in documents:
        tokens = encoder.tokenize(document)
        text = tokenizer.decode(tokens.ids[tokens.is_text].tolist())
        assert text == "".join(part.text for part in document.parts if isinstance(part, TextPart)) + base.END_OF_TEXT
        images, signals = encoder.images(document), tokens.signals
        assert (tokens.ids == tokenizer.special(base.IMAGE)).sum() == sum(len(image.patches) for image in images) // 4
        assert (tokens.ids == tokenizer.special(base.SIGNAL)).sum() == sum(signal.tokens for signal in signals)
        assert tokens.size.patches == sum(len(image.patches) for image in images)
        assert tokens.size.tokens == len(tokens.ids)


def test_a_signal_that_is_cut_has_the_placeholders_of_what_is_left(encoder, model, config):
    length = MAX_SAMPLES + 10_000
    long = Document((SignalPart(np.arange(length, dtype=np.float32)[:, None], 1e5, "V"),), "made", "CC0-1.0", "long")
    with pytest.warns(UserWarning, match=f"cut to its first {MAX_SAMPLES}"):
        tokens = encoder.tokenize(long)
    assert tokens.signals[0].samples_cut == 10_000
    assert (~tokens.is_text).sum() - 2 == tokens.signals[0].tokens < tokens_of(length, 1e5)
    config = dataclasses.replace(config, row=tokens.size, batch_size=1)
    with pytest.warns(UserWarning, match=f"cut to its first {MAX_SAMPLES}"):
        check_inputs(model, PackedData(DocumentList([long]), encoder, model, config)[0].inputs)


def test_placeholders_without_their_contents_are_no_batch(documents, encoder, model, config):
    row = AssembledRow.empty(config.row.tokens)
    tokens = encoder.tokenize(next(d for d in documents if d.source == "signal"))
    row.put(0, tokens.ids, tokens.labels(), segment=1)
    with pytest.raises(ValueError, match=r"time-series placeholders, but the contents give 0 embeddings"):
        collate([row], config.row, model)


def test_a_packed_document_is_the_document(data, encoder, documents, config):
    for row in data.rows:
        assembled = data.assemble(row)
        start = 0
        images, signals = [], []
        for segment, piece in enumerate(row, start=1):
            place = slice(start, start + piece.stop - piece.start)
            tokens = encoder.tokenize(documents[piece.document])
            assert np.array_equal(assembled.tokens[place], tokens.ids[piece.start : piece.stop])
            assert np.array_equal(assembled.positions[place], np.arange(piece.stop - piece.start))
            assert (assembled.segment_ids[place] == segment).all()
            assert np.array_equal(assembled.labels[place], tokens.labels()[piece.start : piece.stop])
            images += encoder.images(documents[piece.document])
            signals += tokens.signals
            start = place.stop
        assert (assembled.segment_ids[start:] == 0).all() and (assembled.labels[start:] == -100).all()
        assert len(images) == len(assembled.images) and len(signals) == len(assembled.signals)
        for ours, alone in zip(assembled.images, images, strict=True):
            assert np.array_equal(ours.patches, alone.patches)
        for ours, alone in zip(assembled.signals, signals, strict=True):
            assert np.array_equal(ours.values, alone.values)


def test_labels_are_the_next_text_token_of_the_same_document(data, tokenizer):
    silent = {tokenizer.special(t) for t in base.SPECIAL_TOKENS} - {tokenizer.special(base.END_OF_TEXT)}
    ends = 0
    for batch in data.in_order():
        tokens, segments, labels = batch.inputs.tokens, batch.inputs.segment_ids, batch.labels
        assert silent.isdisjoint(labels[labels != -100].tolist())
        inner = labels[:, :-1] != -100
        assert np.array_equal(labels[:, :-1][inner], tokens[:, 1:][inner])
        assert np.array_equal(segments[:, :-1][inner], segments[:, 1:][inner])
        ends += (labels == tokenizer.special(base.END_OF_TEXT)).sum()
    assert ends == len(data.sizes)


def test_every_label_is_counted_once_per_epoch(data):
    labels = np.concatenate([batch.labels.ravel() for batch in data.in_order()])
    assert np.array_equal(np.bincount(labels[labels != -100], minlength=336), data.label_counts)


def test_batches_are_what_the_model_accepts_and_have_one_shape(data, model, config):
    shapes = set()
    for step in range(8):
        batch = data[step]
        check_inputs(model, batch.inputs)
        shapes.add(tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch)))
    assert len(shapes) == 1
    assert batch.inputs.vision.patches.shape[:2] == (config.batch_size, config.row.patches)
    assert batch.inputs.time_series.patch_width == config.row.patch_width


def test_media_packs_are_those_of_the_rows(data, model, config):
    step_rows = [data.assemble(row) for row in data.rows[: config.batch_size]]
    batch = next(data.in_order())
    vision = pack_vision([row.images for row in step_rows], model.vision, size=config.row.patches)
    signals = pack_time_series([row.signals for row in step_rows], model.time_series, sizes=config.row.time_series)
    assert same(batch.inputs.vision, vision) and same(batch.inputs.time_series, signals)


def test_each_epoch_has_every_row_once_in_its_own_order(data, config):
    count = data.rows_per_epoch
    assert count % config.batch_size  # so that a batch spans two epochs
    plan = rows_of(data.in_order())[:count]
    seen = rows_of(data[step] for step in range(-(-3 * count // config.batch_size)))
    epochs = [seen[i * count : (i + 1) * count] for i in range(3)]
    assert all(Counter(epoch) == Counter(plan) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_k_does_not_depend_on_how_it_is_reached(data, documents, encoder, model, config):
    read = [data[step] for step in range(9)]
    again = PackedData(DocumentList(documents), encoder, model, config)
    for step in (8, 3, 0, 5):
        assert same(again[step], read[step])
    other = PackedData(DocumentList(documents), encoder, model, dataclasses.replace(config, seed=6))
    assert rows_of([other[0]]) != rows_of([read[0]])


def test_the_same_batches_come_from_files(data, documents, encoder, model, config, tmp_path):
    files = [records.write_records(tmp_path, f"train/{i}", documents[i::2]) for i in range(2)]
    order = documents[0::2] + documents[1::2]
    stored = PackedData(RecordSource(tmp_path, files), encoder, model, config)
    held = PackedData(DocumentList(order), encoder, model, config)
    assert all(same(stored[step], held[step]) for step in range(5))


class Damaged(DocumentList):
    """Some documents cannot be read."""

    def __init__(self, documents, bad=()):
        super().__init__(documents)
        self.bad = set(bad)

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError("damaged record (hash mismatch).")
        return super().__getitem__(index)


def test_a_damaged_document_is_set_aside_and_the_others_stay(documents, encoder, model, config):
    config = dataclasses.replace(config, max_bad_share=0.05)
    data = PackedData(Damaged(documents, [3, 21]), encoder, model, config)
    assert data.quarantine.metrics() == {"data/documents": 50.0, "data/quarantined": 2.0}
    assert data.quarantine.reasons == {documents[i].name: "damaged record (hash mismatch)." for i in (3, 21)}
    assert {piece.document for row in data.rows for piece in row} == set(range(50)) - {3, 21}
    with pytest.raises(DataError, match=r"3 of 50 documents are bad, more than the allowed share 0\.05"):
        PackedData(Damaged(documents, [3, 21, 40]), encoder, model, config)


def test_a_document_damaged_later_leaves_padding_and_the_others_stay(documents, encoder, model, config):
    source = Damaged(documents)
    data = PackedData(source, encoder, model, dataclasses.replace(config, max_bad_share=0.05))
    row = max(data.rows, key=len)
    before = data.assemble(row)
    source.bad = {row[1].document}
    after = data.assemble(row)
    lost = before.segment_ids == 2
    assert lost.any() and (after.segment_ids[lost] == 0).all() and (after.labels[lost] == -100).all()
    for name in ("tokens", "positions", "segment_ids", "labels"):
        assert np.array_equal(getattr(before, name)[~lost], getattr(after, name)[~lost])
    assert list(data.quarantine.reasons) == [documents[row[1].document].name]


def test_what_cannot_be_used_is_set_aside_with_its_reason(documents, encoder, model, config):
    wide = Document((SignalPart(np.zeros((5000, 3), np.float32), 10.0, "V"),), "made", "CC0-1.0", "wide")
    overflow = Document((SignalPart(np.full((5, 1), np.inf, np.float32), 10.0, "V"),), "made", "CC0-1.0", "overflow")
    data = PackedData(DocumentList([*documents, wide, overflow]), encoder, model, dataclasses.replace(config, max_bad_share=0.1))
    reasons = data.quarantine.reasons
    assert "too large for a row: tokens" in reasons["made:wide"] and "samples 1" in reasons["made:wide"]
    assert "5 non-finite values" in reasons["made:overflow"]


def test_nothing_usable_is_an_error(encoder, model, config, documents):
    with pytest.raises(DataError, match="none of 0 documents can be used"):
        PackedData(DocumentList([]), encoder, model, config)
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=300))
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ ids, more than the model's vocab_size=300"):
        PackedData(DocumentList(documents), encoder, small, config)
    with pytest.raises(ConfigError, match=r"signal_pairs=3 must be even"):
        dataclasses.replace(config, row=RowSize(10, signal_pairs=3))
    with pytest.raises(ConfigError, match="batch_size=0"):
        dataclasses.replace(config, batch_size=0)


def test_media_need_their_tower(documents, encoder, model, config):
    for medium, tower in (("image", "vision"), ("signal", "time_series")):
        blind = dataclasses.replace(model, **{tower: None})
        blind_encoder = dataclasses.replace(encoder, model=blind)
        with pytest.raises(ConfigError, match=rf"the data has {medium}s, but .* set ModelConfig\.{tower}"):
            PackedData(DocumentList(documents), blind_encoder, blind, config)
        others = [d for d in documents if d.source not in (medium, "both")]
        data = PackedData(DocumentList(others), blind_encoder, blind, config)
        assert getattr(data[0].inputs, tower) is None and not data.quarantine.reasons


def test_text_without_media_needs_no_packs(documents, encoder, model, config):
    text = [document for document in documents if document.source == "text"]
    data = PackedData(DocumentList(text), encoder, model, dataclasses.replace(config, row=RowSize(128)))
    assert data[0].inputs.vision is None and data[0].inputs.time_series is None


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
