"""Laws of the batches: a function of (seed, step) alone, for any process, order of asking and moment of restart; nothing lost or cut."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.examples import StoredImage, decode_record, encode_record
from interns1pro_jax.data.mixture import CurriculumStage, Source
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import AssembledRow, ReadConfig, collate
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.records import DataError
from interns1pro_jax.data.sources import PreparedSource
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.tokenizer import base

from .conftest import KINDS, make_document

FORMS = ("documents", "chunks", "rows")


@pytest.fixture
def batches(corpus, model, tokenizer):
    """Batches of a corpus; closed at the end."""
    opened = []

    def make(form="documents", places=None, ranks=1, **changes):
        pipeline = {name: changes.pop(name) for name in ("window", "seed", "block", "batch_size", "max_bad_share") if name in changes}
        whole = corpus(form, **changes)
        whole = dataclasses.replace(whole, pipeline=dataclasses.replace(whole.pipeline, **pipeline))
        opened.append(whole.batches(model, tokenizer, whole.open_sources(), ranks, places))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def rows_of(batch):
    """Each row of a batch as bytes."""
    leaves = jax.tree.leaves(batch)
    return [b"".join(leaf[row].tobytes() for leaf in leaves) for row in range(len(leaves[0]))]


def segments(batch):
    """Tokens and labels of every segment of a batch, as one tuple."""
    found = []
    for tokens, ids, positions, labels in zip(
        batch.inputs.tokens, batch.inputs.segment_ids, batch.inputs.positions, batch.labels, strict=True
    ):
        for number in range(1, ids.max(initial=0) + 1):
            mine = ids == number
            assert np.array_equal(positions[mine], np.arange(mine.sum()))
            found.append((tuple(tokens[mine].tolist()), tuple(labels[mine].tolist())))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_segments_are_documents_and_padding_is_nothing(batches, encoder, form):
    data = batches(form)
    encoded = [encoder.encode(make_document(number, kind)) for kind, count in KINDS.items() for number in range(count)]
    known = {(tuple(e.ids.tolist()), tuple(e.labels().tolist())): e for e in encoded}
    for step in range(6):
        batch = data[step]
        for tokens, labels in segments(batch):
            if (tokens, labels) not in known:  # a piece of a text that was cut
                assert any(
                    tokens == k[0][i : i + len(tokens)] and labels == k[1][i : i + len(tokens)] for k in known for i in (0, 128, 256, 384)
                )
        padding = batch.inputs.segment_ids == 0
        assert (batch.inputs.tokens[padding] == 0).all() and (batch.labels[padding] == -100).all()
    assert not data.quarantine.faults


@pytest.mark.parametrize("form", FORMS)
def test_media_are_those_of_their_placeholders(batches, encoder, model, tokenizer, form):
    data = batches(form, kinds=("image", "signal"))
    encoded = [encoder.encode(make_document(number, kind)) for kind in ("image", "signal") for number in range(KINDS[kind])]
    by_ids = {tuple(e.ids.tolist()): e for e in encoded}
    for step in range(4):
        batch = data[step]
        check_inputs(model, batch.inputs)
        for row in range(len(batch.labels)):
            images, signals = [], []
            for number in range(1, batch.inputs.segment_ids[row].max() + 1):
                example = by_ids[tuple(batch.inputs.tokens[row][batch.inputs.segment_ids[row] == number].tolist())]
                for medium in example.media:
                    (images if isinstance(medium, StoredImage) else signals).append(medium)
            alone = AssembledRow.empty(128)
            alone.put_media([*images, *signals], model)
            alone.tokens[:] = batch.inputs.tokens[row]
            expected = collate([alone], data.plan.config.row, model).inputs
            assert same(expected.vision, jax.tree.map(lambda x, row=row: x[row : row + 1], batch.inputs.vision))
            assert same(expected.time_series, jax.tree.map(lambda x, row=row: x[row : row + 1], batch.inputs.time_series))


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_processes_reads_the_same_global_batches(batches, form):
    whole = batches(form, ranks=4, window=2)
    expected = [rows_of(whole[step]) for step in range(4)]
    for hosts in (1, 2, 4):
        places = np.arange(4).reshape(hosts, -1)
        parts = [
            batches(form, ranks=4, window=2, places=part, reading=ReadConfig(threads=1 + host, ahead=host))
            for host, part in enumerate(places)
        ]
        for step in range(4):
            assert [row for part in parts for row in rows_of(part[step])] == expected[step]


@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_kills_and_changes_of_hosts_change_nothing(batches, form):
    """Each life restores what the last one saved, with another number of processes, runs for a random while, saves at a random moment
    and dies some steps after it."""
    block = {"documents": 48, "chunks": 4, "rows": 64}[form]
    whole = batches(form, window=3, block=block)
    generator = np.random.default_rng(1)
    expected: list[list[bytes]] = []
    saved, at = None, 0
    for _ in range(100):
        hosts = int(generator.choice([1, 2, 4]))
        host = int(generator.integers(hosts))
        mine = np.arange(4).reshape(hosts, -1)[host]
        life = batches(form, window=3, block=block, places=mine, reading=ReadConfig(1, 0))
        if saved is not None:
            life.restore(json.loads(saved))
        steps = int(generator.integers(1, 4))
        for step in range(at, at + steps):
            while len(expected) <= step:
                expected.append(rows_of(whole[len(expected)]))
            assert rows_of(life[step]) == [expected[step][place] for place in mine]
        if generator.random() < 0.7:
            at += int(generator.integers(0, steps + 1))
            saved = json.dumps(life.state(at))
        life.close()
    assert at > 50
    if form != "rows":
        assert json.loads(saved)["cursor"]["block"] > 2


@pytest.mark.parametrize("form", FORMS)
def test_batch_k_does_not_depend_on_how_it_is_reached(batches, form):
    data = batches(form, window=2)
    read = [data[step] for step in range(9)]
    for step in (8, 3, 0, 5):
        assert same(batches(form, window=2)[step], read[step])
        assert same(data[step], read[step])
    assert rows_of(batches(form, window=2, seed=6)[0]) != rows_of(read[0])
    assert len({tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch)) for batch in read}) == 1


def test_ranks_only_change_the_places_within_a_batch(batches):
    one, four = batches("rows", ranks=1, window=4), batches("rows", ranks=4, window=4)
    for step in range(8):
        assert Counter(rows_of(one[step])) == Counter(rows_of(four[step]))


def test_until_the_mixture_ends_every_document_came_as_often_as_its_epochs(corpus, model, tokenizer, encoder):
    for form in ("documents", "chunks", "rows"):
        sources = [Source(f"{form}/text", 0.5, epochs=2), Source(f"{form}/image", 0.5, epochs=1)]
        whole = corpus(form, kinds=())
        block = sum(round(s.epochs * len(PreparedSource(f"{whole.directory}/{s.path}"))) for s in sources)
        pipeline = dataclasses.replace(whole.pipeline, batch_size=1, block=block)  # one block is all there is
        whole = dataclasses.replace(whole, sources=sources, pipeline=pipeline)
        data = whole.batches(model, tokenizer, whole.open_sources())
        rows = block if form == "rows" else len(data.plan._block(0))
        seen = Counter(tokens for step in range(rows) for tokens, _ in segments(data[step]))
        expected = Counter()
        for kind, epochs in (("text", 2), ("image", 1)):
            for number in range(KINDS[kind]):
                expected[tuple(encoder.encode(make_document(number, kind)).ids.tolist())] += epochs
        assert seen == expected
        with pytest.raises(ConfigError, match="every source has reached its epochs"):
            data[rows]
        data.close()


def test_weights_of_tokens_hold(batches):
    data = batches("documents", block=256)
    tokens = Counter()
    for step in range(60):
        for row in data.plan.batch(step):
            for piece in row.pieces:
                tokens[data.plan.mixture.sources[piece.source].path] += piece.stop - piece.start
    total = tokens.total()
    for source in data.plan.mixture.sources:
        assert tokens[source.path] / total == pytest.approx(source.weight, abs=0.03)


def test_padding_is_small(corpus, model, tokenizer):
    """Pictures and signals have budgets of their own; where these are not what runs out first, two percent of a row stay empty at most."""
    row = RowSize(128, patches=96, samples=4000, signal_rows=1500, signal_pairs=300, patch_width=6)
    whole = corpus("documents", kinds=("text", "image", "signal"))
    whole = dataclasses.replace(whole, pipeline=dataclasses.replace(whole.pipeline, row=row, block=1024))
    data = whole.batches(model, tokenizer, whole.open_sources())
    rows = data.plan._block(0)
    assert sum(piece.stop - piece.start for row in rows for piece in row.pieces) > 0.98 * 128 * len(rows)


def test_a_later_change_of_weights_leaves_the_past_and_an_earlier_one_is_refused(batches):
    old = batches("documents")
    read = [rows_of(old[step]) for step in range(30)]
    state = json.loads(json.dumps(old.state(30)))
    used = state["drawn"]
    tokens_per_draw = sum(s.tokens / s.records * r for s, r in zip(old.plan.mixture.sizes, old.plan.mixture.stages[0].rates, strict=True))
    later = [CurriculumStage(int(used * tokens_per_draw * 1.2) + 3000, {"documents/text": 0.0})]
    new = batches("documents", curriculum=later)
    assert [rows_of(new[step]) for step in range(30)] == read
    new.restore(state)
    assert rows_of(new[30]) == rows_of(old[30])
    assert any(rows_of(new[step]) != rows_of(old[step]) for step in range(31, 90))
    with pytest.raises(DataError, match=r"draws have been used.* only be added after"):
        batches("documents", curriculum=[CurriculumStage(1000, {"documents/text": 0.0})]).restore(state)
    state["stages"][0]["rates"]["documents/text"] = 0.5
    with pytest.raises(DataError, match=r"differs from draw 0 on .*weights may only change later"):
        new.restore(state)


def test_another_source_under_an_old_name_is_refused(batches):
    data = batches("documents")
    state = data.state(2)
    state["sources"]["documents/text"] = "other"
    with pytest.raises(DataError, match=r"\['documents/text'\] are not the ones of the checkpoint"):
        data.restore(state)


def test_a_system_prompt_stands_before_every_document(batches, corpus, model, tokenizer, encoder):
    prompt = "You are an expert of waves."
    whole = corpus("documents", kinds=("image", "text"))
    sources = [dataclasses.replace(whole.sources[0], system_prompt=prompt), whole.sources[1]]
    whole = dataclasses.replace(whole, sources=sources)
    data = whole.batches(model, tokenizer, whole.open_sources())
    begin = f"<|im_start|>system\n{prompt}<|im_end|>\n"
    seen = Counter()
    for step in range(4):
        for tokens, labels in segments(data[step]):
            text = tokenizer.decode(list(tokens))
            is_image = base.IMAGE in text
            assert text.startswith(begin) == is_image
            seen[is_image] += 1
            if is_image:
                length = len(encoder.system_prompt(prompt))
                assert set(labels[: length - 1]) == {-100} and labels[length] != -100
    assert seen[True] and seen[False]
    data.close()
    rows = corpus("rows", kinds=("image",))
    rows = dataclasses.replace(rows, sources=[dataclasses.replace(rows.sources[0], system_prompt=prompt)])
    with pytest.raises(ConfigError, match=r"holds packed rows; give its system prompt to tools\.prepare_data --system"):
        rows.batches(model, tokenizer, rows.open_sources())


def test_labels_are_the_next_text_token_of_the_same_document(batches, tokenizer):
    silent = {tokenizer.special(t) for t in base.SPECIAL_TOKENS} - {tokenizer.special(base.END_OF_TEXT)}
    data = batches("documents", kinds=("text", "image", "signal"))
    for step in range(4):
        batch = data[step]
        tokens, ids, labels = batch.inputs.tokens, batch.inputs.segment_ids, batch.labels
        assert silent.isdisjoint(labels[labels != -100].tolist())
        inner = labels[:, :-1] != -100
        assert np.array_equal(labels[:, :-1][inner], tokens[:, 1:][inner])
        assert np.array_equal(ids[:, :-1][inner], ids[:, 1:][inner])


def damage(monkeypatch, wanted, change):
    """Changes the bytes of some records as they are read."""
    read = PreparedSource.bytes_of

    def bytes_of(self, index):
        record = read(self, index)
        return change(record) if wanted(self.directory, index) else record

    monkeypatch.setattr(PreparedSource, "bytes_of", bytes_of)


def broken_image(record):
    example = decode_record(record).example(0)
    return encode_record([dataclasses.replace(example, media=(StoredImage(b"\x89PNG\r\n" + bytes(50), example.media[0].grid),))])


@pytest.mark.parametrize(("change", "reason"), [(lambda record: record[:-9], "damaged record"), (broken_image, "unreadable file")])
def test_what_cannot_be_read_leaves_padding_and_is_counted_by_reason(batches, monkeypatch, change, reason):
    before = [batches("documents", kinds=("text", "image"))[step] for step in range(3)]
    damage(monkeypatch, lambda directory, index: directory.endswith("image") and index % 10 == 3, change)
    data = batches("documents", kinds=("text", "image"))
    lost = 0
    for step, whole in enumerate(before):
        batch = data[step]
        gone = whole.inputs.segment_ids != batch.inputs.segment_ids
        assert (batch.inputs.segment_ids[gone] == 0).all() and (batch.labels[gone] == -100).all()
        for name in ("tokens", "positions", "segment_ids"):
            assert np.array_equal(getattr(whole.inputs, name)[~gone], getattr(batch.inputs, name)[~gone])
        lost += gone.any(1).sum()
    earlier, metrics = data.metrics(1), data.metrics(3)
    count = metrics["data/quarantined"]
    assert 0 < earlier["data/records"] < metrics["data/records"] and earlier["data/quarantined"] <= count  # although more has been read
    shares = {name: value for name, value in metrics.items() if "share" in name}
    assert len(shares) == 2 and np.isclose(sum(shares.values()), 1) and min(shares.values()) > 0
    continued = batches("documents", kinds=("text", "image"))
    continued.restore(data.state(3))
    assert continued.metrics(3) == metrics
    assert 0 < count <= 6 and lost and metrics[f"data/quarantined/{reason.replace(' ', '_')}"] == count
    assert all("image" in name for name in data.quarantine.faults)


def test_a_packed_row_that_cannot_be_read_is_padding(batches, monkeypatch):
    before = [batches("rows")[step] for step in range(4)]
    damage(monkeypatch, lambda directory, index: directory.endswith("image") and index % 4 == 1, lambda record: record[:-9])
    data = batches("rows")
    lost = 0
    for step in range(4):
        whole, batch = before[step], data[step]
        gone = batch.inputs.segment_ids.max(1) == 0
        assert (batch.inputs.tokens[gone] == 0).all() and (batch.labels[gone] == -100).all()
        assert [row for row, bad in zip(rows_of(batch), gone, strict=True) if not bad] == [
            row for row, bad in zip(rows_of(whole), gone, strict=True) if not bad
        ]
        lost += gone.sum()
    assert lost and data.quarantine.reasons == {"damaged record": len(data.quarantine.faults)}
    assert all("rows/image/shards" in name for name in data.quarantine.faults)


def test_too_many_bad_records_stop_the_run(batches, monkeypatch):
    monkeypatch.setattr("interns1pro_jax.data.quarantine._FEWEST", 10)
    damage(monkeypatch, lambda directory, index: directory.endswith("image"), lambda record: b"")
    data = batches("documents", max_bad_share=0.05)
    with pytest.raises(DataError, match=r"\d+ of \d+ records are bad \(\d+ damaged record\), more than the allowed share 0\.05"):
        for step in range(20):
            data[step]


def test_documents_that_no_row_has_room_for_are_counted(corpus, model, tokenizer):
    whole = corpus("documents", kinds=("text", "signal"))
    row = dataclasses.replace(whole.pipeline.row, samples=100)
    whole = dataclasses.replace(whole, pipeline=dataclasses.replace(whole.pipeline, row=row, max_bad_share=1))
    data = whole.batches(model, tokenizer, whole.open_sources())
    for step in range(6):
        data[step]
    assert data.quarantine.reasons["too large for a row"] > 5
    assert all("samples" in fault.detail for fault in data.quarantine.faults.values())
    data.close()


def test_worker_processes_make_the_same_batches(batches):
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    here, elsewhere = batches("documents", window=2), batches("documents", window=2, reading=ReadConfig(processes=1))
    assert all(same(here[step], elsewhere[step]) for step in range(3))


def test_what_does_not_belong_together_is_refused(corpus, model, tokenizer, config):
    whole = corpus("rows")
    mixed = dataclasses.replace(whole, sources=[*whole.sources[:1], *corpus("documents").sources[1:]])
    with pytest.raises(ConfigError, match="of packed rows or of documents, not of both"):
        mixed.batches(model, tokenizer, mixed.open_sources())
    other = dataclasses.replace(whole, pipeline=dataclasses.replace(config, row=RowSize(64)))
    with pytest.raises(DataError, match=r"was packed for RowSize.*the run has"):
        other.batches(model, tokenizer, other.open_sources())
    vision = dataclasses.replace(model.vision, patch_size=32)
    with pytest.raises(DataError, match="was prepared for patches"):
        whole.batches(dataclasses.replace(model, vision=vision), tokenizer, whole.open_sources())
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=300))
    with pytest.raises(ConfigError, match=r"vocab_size=300 must not be smaller"):
        whole.batches(small, tokenizer, whole.open_sources())
    chunks = corpus("chunks")
    chunks = dataclasses.replace(chunks, pipeline=dataclasses.replace(config, block=4096))
    with pytest.raises(ConfigError, match=r"documents in a record.*set it to 512 or less"):
        chunks.batches(model, tokenizer, chunks.open_sources())
    with pytest.raises(ConfigError, match="must divide over the 3 data-parallel ranks"):
        whole.batches(model, tokenizer, whole.open_sources(), ranks=3)
    with pytest.raises(ConfigError, match=r"signal_pairs=3 must be even"):
        PipelineConfig(RowSize(10, signal_pairs=3))
    with pytest.raises(ConfigError, match="batch_size=0"):
        PipelineConfig(RowSize(10), batch_size=0)


def test_placeholders_without_their_contents_are_no_batch(examples, model, config):
    row = AssembledRow.empty(config.row.tokens)
    example = next(e for e in examples if e.name.startswith("signal"))
    row.put(0, example.ids, example.labels(), segment=1)
    with pytest.raises(ValueError, match=r"time-series placeholders, but the contents give 0 embeddings"):
        collate([row], config.row, model)


def test_text_without_media_needs_no_packs(batches, corpus, model, tokenizer):
    whole = corpus("documents", kinds=("text",))
    whole = dataclasses.replace(whole, pipeline=dataclasses.replace(whole.pipeline, row=RowSize(128)))
    batch = whole.batches(model, tokenizer, whole.open_sources())[0]
    assert batch.inputs.vision is None and batch.inputs.time_series is None
