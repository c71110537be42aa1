"""Users' files become sources: every record is there or rejected with its reason, however the work was cut, killed or shared."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data import paths, preparation
from interns1pro_jax.data.formats import RecordReader
from interns1pro_jax.data.media.limits import MediaError
from interns1pro_jax.data.preparation import PreparationConfig, slices_of
from interns1pro_jax.data.records import DataError, Document, RejectedRecord, TextPart
from interns1pro_jax.data.sources import PreparedSource, read_examples
from interns1pro_jax.data.transforms import Transform
from tools import prepare_data

from .conftest import WORDS, make_text


def image_file(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def signal_file(length=50):
    file = io.BytesIO()
    np.save(file, np.sin(np.arange(length, dtype=np.float32))[:, None])
    return file.getvalue()


IMAGE = {"type": "image_url", "image_url": {"url": "image.png"}}
SIGNAL = {"type": "time_series_url", "time_series_url": {"url": "signal.npy", "sampling_rate": 10}}
TEXT = {"type": "text", "text": "a wave of light"}


@pytest.fixture
def reader(tmp_path, model):
    (tmp_path / "image.png").write_bytes(image_file())
    (tmp_path / "signal.npy").write_bytes(signal_file())
    return RecordReader("made", str(tmp_path), model.vision)


def test_forms_become_documents(reader, encoder):
    plain = reader.document({"text": "a wave", "id": "x", "tags": ["physics"], "licence": "CC0-1.0"}, "1")
    assert plain.parts == (TextPart("a wave"),) and (plain.name, plain.tags, plain.licence) == ("made:x", ("physics",), "CC0-1.0")
    inline = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image_file()).decode()}"}}
    mixed = reader.document({"content": [TEXT, IMAGE, SIGNAL, inline]}, "2")
    assert encoder.encode(mixed).size.patches == 2 * 8
    assert mixed.parts[1].content == mixed.parts[3].content == image_file() and mixed.parts[2].sampling_rate == 10
    messages = [{"role": "user", "content": [IMAGE, TEXT]}, {"role": "assistant", "content": "light", "loss": False}]
    chat = dataclasses.replace(reader, system="Look.").document({"messages": messages}, "3")
    assert chat.messages[0] == {"role": "system", "content": "Look."} and len(chat.parts) == 1
    assert chat.messages[1]["content"] == [{"type": "image"}, TEXT] and chat.messages[2] == messages[1]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a known form"),
        ({"txt": "a"}, "not a known form"),
        ({"text": "a", "content": []}, "not a known form"),
        ({"text": "a", "imgae": "x"}, "not a known form"),
        ({"text": " "}, "empty"),
        ({"text": 3}, "not a known form"),
        ({"text": "a", "tags": "b"}, "not a known form"),
        ({"content": []}, "not a known form"),
        ({"content": [{"type": "image", "url": "x"}]}, "not a known form"),
        ({"content": [{"type": "image_url", "image_url": {"url": "image.png", "sise": 3}}]}, "not a known form"),
        ({"content": [{"type": "image_url", "image_url": {"url": "absent.png"}}]}, "missing file"),
        ({"content": [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]}, "missing file"),
        ({"content": [{"type": "image_url", "image_url": {"url": "signal.npy"}}]}, "unreadable file"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,#"}}]}, "unreadable file"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}]}, "unreadable file"),
        ({"content": [{"type": "image_url", "image_url": {"url": "image\0.png"}}]}, "missing file"),
        ({"content": [{"type": "time_series_url", "time_series_url": {"url": "image.png"}}]}, "unsupported content"),
        ({"content": [{"type": "time_series_url", "time_series_url": {"url": "signal.npy", "sampling_rate": "10"}}]}, "not a known form"),
        ({"content": [{"type": "time_series_url", "time_series_url": {"url": "signal.npy", "channels": [[1]]}}]}, "needs a choice"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"fields": {"a": 1}}, "not a known form"),
    ],
)
def test_whatever_is_wrong_with_a_record_has_a_reason(reader, record, reason):
    with pytest.raises((RejectedRecord, MediaError)) as caught:
        reader.document(record, "1")
    assert caught.value.reason == reason


def test_structured_records_are_put_into_words():
    narrative = Transform(json.dumps({"narrative": [f"{word}: {{name}} melts at {{kelvin:.1f}} K" for word in WORDS]}).encode())
    written = [narrative({"fields": {"name": "ice", "kelvin": 273.15}, "id": str(i)}, "") for i in range(40)]
    assert all(record["text"].endswith(": ice melts at 273.1 K") for record in written)
    assert len({record["text"] for record in written}) > 5
    assert written[3] == narrative({"fields": {"name": "ice", "kelvin": 273.15}, "id": "3"}, "")
    task = {"question": "{instruction}\n{peaks:list}\n{table:table}", "answer": "{name}"}
    tasks = Transform(json.dumps({"tasks": [task], "instructions": ["Name it.", "What is it?"]}).encode())
    fields = {"peaks": [1, 2.5, "c"], "table": [{"a": 1, "b": 2}, {"a": 3, "b": 4}], "name": "quartz"}
    asked = {tasks({"fields": fields, "id": str(i)}, "")["messages"][0]["content"].split("\n", 1)[0] for i in range(20)}
    assert asked == {"Name it.", "What is it?"}
    record = tasks({"fields": fields, "tags": ["x"]}, "1")
    assert record["messages"][0]["content"].split("\n", 1)[1] == "1, 2.5 and c\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
    assert record["messages"][1] == {"role": "assistant", "content": "quartz"} and record["tags"] == ["x"]
    assert tasks({"text": "a"}, "1") == {"text": "a"}
    for broken in ({"peaks": [], "table": [], "name": "q"}, {"peaks": [1], "table": [[1]], "name": ["q"]}, {"peaks": [1]}):
        with pytest.raises(RejectedRecord) as caught:
            tasks({"fields": broken}, "1")
        assert caught.value.reason == "missing field"
    attack = Transform(json.dumps({"narrative": ["{a.__class__}"]}).encode())
    with pytest.raises(RejectedRecord, match=r"names 'a\.__class__'"):
        attack({"fields": {"a": 1}}, "1")
    for wrong in (b"{", b"[]", b"{}", b'{"narrative": [], "tasks": []}', b'{"narrative": [1]}', b'{"tasks": [{"question": "a"}]}'):
        with pytest.raises(ConfigError):
            Transform(wrong)


@pytest.fixture
def corpus_file(tmp_path, reader):
    """JSON lines with texts, pictures, and lines that cannot be used."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(200):
        text = make_text(generator, int(generator.integers(1, 60)))
        record = {"content": [{"type": "text", "text": text}, IMAGE]} if number % 10 == 0 else {"text": text, "id": str(number)}
        lines.append(json.dumps(record, ensure_ascii=False))
    lines[17], lines[63], lines[64] = '{"text": ', '{"text": ""}', '{"content": [{"type": "image_url", "image_url": {"url": "gone.png"}}]}'
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_job(encoder, config, directory, reader, kind="documents", **changes):
    preparation_config = PreparationConfig(kind, config.row, slice_bytes=2000, **changes)
    content = preparation.digest(preparation_config, encoder, reader, None)
    return prepare_data.Job(preparation_config, encoder, dataclasses.replace(reader, base=""), None, directory and str(directory), content)


def run(job, path, workers=1):
    output = io.StringIO()
    prepare_data.run(job, [str(path)], workers, Console(file=output, width=200))
    return output.getvalue()


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_every_record_is_there_or_rejected(tmp_path, encoder, config, reader, corpus_file):
    shown = run(make_job(encoder, config, tmp_path / "out", reader), corpus_file)
    examples = read_examples(str(tmp_path / "out"))
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert len(examples) + len(rejected) == 200
    assert sorted(fault["reason"] for fault in rejected) == ["empty", "missing file", "not JSON"]
    assert all(f"{reason}" in shown for reason in ("empty", "missing file", "not JSON", "197 documents"))
    manifest = PreparedSource(str(tmp_path / "out")).manifest
    assert manifest.tokens == sum(len(e.ids) for e in examples)
    assert manifest.trained_tokens == PreparedSource(str(tmp_path / "out")).label_counts.sum() > 0
    lines = corpus_file.read_text().splitlines()
    number = int(examples[30].name.partition(":")[2])
    expected = encoder.encode(Document((TextPart(json.loads(lines[number])["text"]),), "made", "", str(number)))
    assert np.array_equal(examples[30].ids, expected.ids)


@pytest.mark.parametrize("kind", ["documents", "rows"])
def test_the_result_does_not_depend_on_kills_and_workers(tmp_path, encoder, config, reader, corpus_file, kind, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(make_job(encoder, config, whole, reader, kind), corpus_file)
    slices = slices_of([str(corpus_file)], 2000)
    assert len(slices) > 5

    class Kill(Exception):
        pass

    done, prepare_slice = [], preparation.prepare_slice
    for survives in (2, 1, 100):
        end = len(done) + survives

        def dying(piece, *args, end=end):
            if len(done) == end:
                raise Kill
            done.append(piece.number)
            return prepare_slice(piece, *args)

        monkeypatch.setattr(preparation, "prepare_slice", dying)
        try:
            run(make_job(encoder, config, killed, reader, kind), corpus_file)
        except Kill:
            with pytest.raises(DataError, match="holds no prepared source"):
                PreparedSource(str(killed))
    assert sorted(done) == list(range(len(slices)))
    assert files(killed) == files(whole)
    assert "nothing to do" in run(make_job(encoder, config, killed, reader, kind), corpus_file)
    with pytest.raises(DataError, match="another input or configuration"):
        run(make_job(encoder, config, killed, reader, kind, chunk_tokens=50), corpus_file)


def test_processes_give_the_same_as_one(tmp_path, encoder, config, reader, corpus_file):
    run(make_job(encoder, config, tmp_path / "one", reader), corpus_file)
    run(make_job(encoder, config, tmp_path / "two", reader), corpus_file, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_check_writes_nothing(tmp_path, encoder, config, reader, corpus_file):
    before = files(tmp_path)
    shown = run(make_job(encoder, config, None, reader), corpus_file)
    assert "197 documents" in shown and "gone.png" in shown and files(tmp_path) == before


def test_too_many_rejected_records_complete_nothing(tmp_path, encoder, config, reader, corpus_file):
    with pytest.raises(DataError, match=r"3 of 200 records were rejected .*more than the allowed share 0\.01"):
        run(make_job(encoder, config, tmp_path / "out", reader, max_rejected=0.01), corpus_file)
    with pytest.raises(DataError, match="holds no prepared source"):
        PreparedSource(str(tmp_path / "out"))
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 3


def test_rows_hold_every_token_once(tmp_path, encoder, config, reader, corpus_file):
    run(make_job(encoder, config, tmp_path / "documents", reader), corpus_file)
    run(make_job(encoder, config, tmp_path / "rows", reader, "rows"), corpus_file)
    rows = PreparedSource(str(tmp_path / "rows"))
    records = [rows[index] for index in range(len(rows))]
    assert all(len(record.ids) <= config.row.tokens for record in records)
    tokens = np.sort(np.concatenate([record.ids for record in records]))
    assert np.array_equal(tokens, np.sort(np.concatenate([e.ids for e in read_examples(str(tmp_path / "documents"))])))
    assert np.array_equal(rows.costs, [np.square(record.lengths.astype(float)).sum() for record in records])
    assert rows.manifest.row == config.row


def test_parquet_gives_what_json_lines_give(tmp_path, encoder, config, reader, corpus_file):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    generator = np.random.default_rng(3)
    records = [{"text": make_text(generator, 20)} if number % 3 else {"content": [TEXT, IMAGE, SIGNAL]} for number in range(100)]
    for number, record in enumerate(records):
        record["id"] = str(number)
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(
        pyarrow.Table.from_pylist([{"text": None, "content": None, **record} for record in records]),
        tmp_path / "same.parquet",
        row_group_size=40,
    )
    run(make_job(encoder, config, tmp_path / "a", reader), path)
    run(make_job(encoder, config, tmp_path / "b", reader), tmp_path / "same.parquet")
    a, b = read_examples(str(tmp_path / "a")), read_examples(str(tmp_path / "b"))
    assert [e.name for e in a] == [e.name for e in b] and all(np.array_equal(x.ids, y.ids) for x, y in zip(a, b, strict=True))


def test_other_stores_are_read_and_written_alike(tmp_path, encoder, config, reader, corpus_file):
    """An object store stands in as fsspec's memory; gs:// and s3:// differ by their libraries alone."""
    for name in ("corpus.jsonl", "image.png"):
        paths.write_bytes(f"memory://in/{name}", (tmp_path / name).read_bytes())
    run(make_job(encoder, config, tmp_path / "out", reader), corpus_file)
    run(make_job(encoder, config, "memory://out", reader), "memory://in/*.jsonl")
    here, there = PreparedSource(str(tmp_path / "out")), PreparedSource("memory://out")
    assert len(here) == len(there) == 197 and there.damaged() == []
    assert all(np.array_equal(here[index].ids, there[index].ids) for index in (0, 50, 196))
    assert np.array_equal(here.sizes, there.sizes)
    paths.remove_tree("memory://out")
    assert not paths.exists("memory://out/manifest.json")


def test_inputs_that_are_none_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\*\.jsonl matches no file"):
        slices_of([str(tmp_path / "absent*.jsonl")], 100)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"x\.txt is neither JSON lines"):
        slices_of([str(tmp_path / "x.txt")], 100)
    with pytest.raises(ConfigError, match="kind='row'"):
        PreparationConfig("row", None)
    with pytest.raises(ConfigError, match="absent://x cannot be reached"):
        paths.read_bytes("absent://x")
