"""Encoded documents: what they hold, and their round trip through bytes and files; damage is found, named, and harms nothing else."""

import dataclasses

import msgpack
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError, ModelConfig, TextConfig
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.examples import StoredImage, StoredSignal, StoredVideo, decode_record, encode_record
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.records import DamagedRecord, DataError, Document, ImagePart, SignalPart, TextPart, VideoPart
from interns1pro_jax.data.sources import Manifest, PreparedSource, ShardWriter, read_examples, write_index
from interns1pro_jax.data.validation import PackedExamples
from interns1pro_jax.models.interns1pro import check_inputs
from interns1pro_jax.models.time_series_inputs import MAX_SAMPLES, tokens_of
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import model_token_ids
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from interns1pro_jax.tower_config import InternVitConfig

from .conftest import KINDS, make_document


def same(a, b):
    return encode_record([a]) == encode_record([b])


def test_a_document_is_tokens_placeholders_and_an_end(examples, tokenizer, model, documents):
    for document, example in zip(documents, examples, strict=True):
        text = tokenizer.decode(example.ids[example.trained].tolist())
        assert text == "".join(part.text for part in document.parts if isinstance(part, TextPart)) + base.END_OF_TEXT
        images = [medium.item(model.vision) for medium in example.media if isinstance(medium, StoredImage)]
        signals = [medium.signal() for medium in example.media if isinstance(medium, StoredSignal)]
        assert (example.ids == tokenizer.special(base.IMAGE)).sum() == sum(len(image.patches) for image in images) // 4
        assert (example.ids == tokenizer.special(base.SIGNAL)).sum() == sum(signal.tokens for signal in signals)
        assert example.size.patches == sum(len(image.patches) for image in images)
        assert example.size.tokens == len(example.ids)


def test_a_signal_that_is_cut_has_the_placeholders_of_what_is_left(encoder):
    length = MAX_SAMPLES + 10_000
    long = Document((SignalPart(np.arange(length, dtype=np.float32)[:, None], 1e5, "V"),), "made", "CC0-1.0", "long")
    with pytest.warns(UserWarning, match=f"cut to its first {MAX_SAMPLES}"):
        example = encoder.encode(long)
        signal = example.media[0].signal()
    assert signal.samples_cut == 10_000
    assert (~example.trained).sum() - 2 == signal.tokens < tokens_of(length, 1e5)


def test_a_video_has_its_times_and_a_pair_of_marks_for_each_patch(encoder, tokenizer, model):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 64, 3), np.uint8)
    example = encoder.encode(Document((VideoPart(frames, (0.5, 1.5)), TextPart("light")), "made", "", "v"))
    shown = tokenizer.decode(example.ids.tolist())
    patch = base.VISION_START + base.VIDEO * 2 + base.VISION_END
    assert shown == f"<0.5 seconds>{patch}<1.5 seconds>{patch}light{base.END_OF_TEXT}"
    assert tokenizer.decode(example.ids[example.trained].tolist()) == f"light{base.END_OF_TEXT}"
    assert example.size.patches == 16 and example.media[0].item(model.vision).grid == (2, 2, 4)
    (stored,) = decode_record(encode_record([example])).example(0).media
    assert isinstance(stored, StoredVideo) and np.array_equal(stored.frames, frames)


@pytest.fixture
def released(reference, encoder):
    """An encoder with the released tokenizer."""
    tokenizer = ScientificTokenizer.load(reference / "official")
    ids = {name: tokenizer.special(token) for name, token in (("image_token_id", base.IMAGE), ("ts_token_id", base.SIGNAL))}
    return dataclasses.replace(encoder, tokenizer=tokenizer, model=dataclasses.replace(encoder.model, **ids))


def test_a_conversation_learns_what_an_assistant_writes(released):
    pixels, samples = np.full((32, 64, 3), 200, np.uint8), np.sin(np.arange(50, dtype=np.float32))[:, None]
    question = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": " beside "}, {"type": "time_series"}]
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "A wave."})
    parts = (ImagePart(pixels), SignalPart(samples, 10.0, "V"))
    example = released.encode(Document(parts, "made", "", "c", messages=messages))
    assert (example.ids == released.model.image_token_id).sum() == 2
    assert (example.ids == released.model.ts_token_id).sum() == example.media[1].signal().tokens
    labels = example.labels()
    assert released.tokenizer.decode(labels[labels != -100].tolist()).endswith("A wave.<|im_end|>")
    assert "What" not in released.tokenizer.decode(labels[labels != -100].tolist())


def test_a_system_prompt_is_what_the_template_makes_of_it(released):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with_system = released.tokenizer.encode_chat([{"role": "system", "content": "You are a chemist."}, *messages]).ids
    without = released.tokenizer.encode_chat(messages).ids
    prompt = released.system_prompt("You are a chemist.")
    assert np.array_equal(with_system, np.concatenate([prompt, without]))


def test_a_conversation_needs_a_template(encoder):
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        encoder.encode(Document((), "made", "", "c", messages=({"role": "assistant", "content": "Hi"},)))


def test_media_need_their_tower(documents, encoder, model):
    for medium, tower in (("image", "vision"), ("signal", "time_series")):
        blind = dataclasses.replace(encoder, model=dataclasses.replace(model, **{tower: None}))
        with pytest.raises(ConfigError, match=rf"the data has {medium}s, but .* set ModelConfig\.{tower}"):
            blind.encode(next(d for d in documents if d.source == medium))


def test_a_record_gives_back_its_documents(examples):
    record = decode_record(encode_record(examples))
    assert len(record.lengths) == len(examples) and record.names() == [example.name for example in examples]
    for number, example in enumerate(examples):
        again = record.example(number)
        assert same(again, example) and again.size == example.size and again.tags == example.tags
        assert np.array_equal(again.labels(), example.labels())


def test_a_piece_of_a_text_knows_what_follows(examples):
    long = next(example for example in examples if example.name.startswith("long"))
    pieces = [long.piece(start, min(start + 100, len(long.ids))) for start in range(0, len(long.ids), 100)]
    record = decode_record(encode_record(pieces))
    assert np.array_equal(record.labels, long.labels()) and np.array_equal(record.ids, long.ids)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(version=1), "record version 1"),
        (lambda c: c.pop("ids"), "KeyError"),
        (lambda c: c.update(lengths=np.array([3], "<i4").tobytes()), "cannot have documents"),
        (lambda c: c.update(tails=b""), "cannot have documents"),
        (lambda c: c["media"].append([0, "smell", b"", []]), "unknown medium 'smell'"),
        (lambda c: c["media"].append([0, "signal", b"123", [1, 1], 1.0]), "ValueError"),
    ],
)
def test_every_broken_record_is_refused_with_its_reason(examples, change, reason):
    content = msgpack.unpackb(encode_record(examples[:3]))
    change(content)
    with pytest.raises(DamagedRecord, match=reason):
        decode_record(msgpack.packb(content))


def test_random_bytes_are_refused():
    generator = np.random.default_rng(0)
    for length in range(40):
        with pytest.raises(DataError):
            decode_record(generator.bytes(length))


def test_sources_give_back_every_document_in_any_order(directory, encoder):
    for form in ("documents", "chunks"):
        source = PreparedSource(str(directory / form / "image"))
        assert source.manifest.documents == KINDS["image"] and (len(source) == KINDS["image"]) == (form == "documents")
        found = {example.name: example for example in read_examples(str(directory / form / "image"))}
        for number in range(KINDS["image"]):
            assert same(found[f"image:{number}"], encoder.encode(make_document(number, "image")))
        for index in np.random.default_rng(0).permutation(len(source)).tolist():
            document = int(source.offsets[index])
            sizes = [RowSize(*line) for line in source.sizes[document : source.offsets[index + 1]].tolist()]
            assert sizes == [source[index].example(n).size for n in range(len(sizes))]
        with pytest.raises(IndexError):
            source[len(source)]
        assert source.damaged() == []


@pytest.fixture
def copy(tmp_path, examples):
    """A source of two shards and its files."""
    shards = []
    for number in range(2):
        writer = ShardWriter(str(tmp_path), f"shards/{number}.array_record")
        for example in examples[20 + number * 5 : 25 + number * 5]:
            writer.write(encode_record([example]))
        shards.append(writer.close())
    sizes = np.array([dataclasses.astuple(e.size) for e in examples[20:30]])
    write_index(str(tmp_path), {"sizes": sizes, "offsets": np.arange(11)})
    manifest = Manifest("documents", tuple(shards), 10, int(sizes[:, 0].sum()), 1, None, "", None, {}, 0, "", {})
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    return tmp_path


def test_damage_in_a_shard_is_found_and_harms_only_its_record(copy, examples):
    victim = copy / "shards/1.array_record"
    data = bytearray(victim.read_bytes())
    # A picture of noise is in the file as it is.
    position = data.find(examples[26].media[0].content[200:216])
    assert position > 0
    data[position] ^= 0xFF
    victim.write_bytes(data)
    source = PreparedSource(str(copy))
    with pytest.raises(DamagedRecord, match=r"1\.array_record\[1\] is damaged"):
        source[6]
    assert all(same(source[index].example(0), examples[20 + index]) for index in range(10) if index != 6)
    assert source.damaged() == ["shards/1.array_record"]


def test_truncated_and_missing_shards_are_named_and_the_others_stay(copy, examples):
    victim = copy / "shards/0.array_record"
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedRecord, match=r"0\.array_record has \d+ bytes, but \d+ bytes were written"):
        PreparedSource(str(copy))[0]
    victim.unlink()
    source = PreparedSource(str(copy))
    with pytest.raises(DamagedRecord, match=r"0\.array_record is absent"):
        source[0]
    assert same(source[5].example(0), examples[25])


def test_absent_and_broken_manifests_are_named(copy):
    path = copy / "manifest.json"
    content = path.read_text()
    for broken in ("{", "[]", '{"format": 2}'):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"manifest\.json is broken"):
            PreparedSource(str(copy))
    path.write_text(content.replace('"format": 2', '"format": 1'))
    with pytest.raises(DataError, match="another format"):
        PreparedSource(str(copy))
    path.unlink()
    with pytest.raises(DataError, match=r"holds no prepared source .*python -m tools\.prepare_data"):
        PreparedSource(str(copy))


def test_few_shards_are_open_at_a_time(copy, monkeypatch):
    monkeypatch.setattr("interns1pro_jax.data.sources._MAX_OPEN", 1)
    source = PreparedSource(str(copy))
    for index in (0, 5, 1, 6):
        assert len(source[index].lengths) == 1 and len(source._readers) == 1


def test_images_of_a_model_with_tiles_are_rows_of_whole_tiles(tokenizer):
    tower = InternVitConfig(
        depth=1, hidden_size=8, num_heads=1, intermediate_size=8, image_size=28, patch_size=7, max_tiles=4, out_hidden_size=32
    )
    text = TextConfig(vocab_size=336, hidden_size=32, router_n_groups=1, fope=None)
    model = ModelConfig(text, tower, None, family="interns1", **model_token_ids(tokenizer))
    encoder = DocumentEncoder(tokenizer, model, PixelBounds())
    examples = [encoder.encode(make_document(number, "image")) for number in range(8)]
    tiles = [medium.grid[0] for example in examples for medium in example.media]
    assert min(tiles) < max(tiles) == 5  # four, and the whole
    packed = PackedExamples(examples, model, PipelineConfig(RowSize(64, patches=160), batch_size=2))
    assert not packed.left_out
    marked = 0
    for batch, _ in packed.in_order():
        check_inputs(model, batch.inputs)
        marked += int((batch.inputs.tokens == model.image_token_id).sum())
        assert (batch.labels != model.image_token_id).all()
    assert marked == 4 * sum(tiles)
