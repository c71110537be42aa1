"""The prepared directory is complete or absent, and anything missing or damaged is named."""

import dataclasses
import json

import pytest

from interns1pro_jax.data import prepared, records
from interns1pro_jax.data.prepared import PreparedData
from interns1pro_jax.data.records import DataError


@pytest.fixture
def data(tmp_path, documents, tokenizer):
    files = {
        "train": [records.write_records(tmp_path, "train/a.array_record", documents[:20])],
        "validation": [records.write_records(tmp_path, "validation/a.array_record", documents[20:24])],
    }
    tokenizer.save(tmp_path / prepared.TOKENIZER)
    counts = {"train": {"text": 20}, "validation": {"image": 4}}
    digest = records.sha256_of(tmp_path / prepared.TOKENIZER)
    return PreparedData(tmp_path, "f00d", files, counts, digest, [{"name": "made", "licence": "CC0-1.0"}])


def test_saved_and_opened_is_the_same(data, documents):
    data.save()
    again = PreparedData.open(data.directory)
    assert dataclasses.asdict(again) == dataclasses.asdict(data)
    assert [again.source("train")[i].name for i in range(20)] == [d.name for d in documents[:20]]
    assert len(again.source("validation")) == 4
    assert again.tokenizer().decode(again.tokenizer().encode("wave")) == "wave"
    assert again.damaged() == []


def test_absent_and_broken_directories_are_named(data):
    with pytest.raises(DataError, match=r"holds no prepared data .*; run: python -m tools\.fetch_data --output"):
        PreparedData.open(data.directory)
    data.save()
    path = data.directory / prepared.MANIFEST
    with pytest.raises(DataError, match=r"no split .test. in .*it has train, validation"):
        data.source("test")
    content = json.loads(path.read_text())
    for broken in ("{", json.dumps({"format": 1}), json.dumps({**content, "extra": 1}), "[]"):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"manifest\.json is broken"):
            PreparedData.open(data.directory)
    path.write_text(json.dumps({**content, "format": 0}))
    with pytest.raises(DataError, match=r"manifest\.json has another format"):
        PreparedData.open(data.directory)


def test_changed_bytes_are_found(data):
    path = data.directory / "train/a.array_record"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    (data.directory / prepared.TOKENIZER).unlink()
    assert data.damaged() == ["train/a.array_record", prepared.TOKENIZER]
