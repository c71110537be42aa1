"""Round trips of documents through bytes and files; damage is found, named, and harms nothing else."""

import msgpack
import numpy as np
import pytest

from interns1pro_jax.data import records
from interns1pro_jax.data.quarantine import Quarantine
from interns1pro_jax.data.records import DataError, Document, ImagePart, SignalPart, TextPart
from interns1pro_jax.data.sources import RecordSource


def make_document(number: int) -> Document:
    generator = np.random.default_rng(number)
    parts = (
        TextPart(f"Document {number}: é水\n"),
        ImagePart(generator.integers(0, 256, (8, 5 + number % 3, 3), np.uint8)),
        SignalPart(generator.normal(size=(20, 1 + number % 2)).astype(np.float32), [None, 100.0][number % 2], "mV"),
        TextPart("end"),
    )
    return Document(parts, "made", "CC0-1.0", str(number), ("test",))


def same(a: Document, b: Document) -> bool:
    return records.encode(a) == records.encode(b)


@pytest.fixture
def directory(tmp_path):
    files = [
        records.write_records(tmp_path, "train/a.array_record", map(make_document, range(5))),
        records.write_records(tmp_path, "train/b.array_record", map(make_document, range(5, 12))),
    ]
    return tmp_path, files


def test_record_round_trip():
    document = make_document(1)
    again = records.decode(records.encode(document))
    assert (again.source, again.licence, again.identifier, again.tags) == ("made", "CC0-1.0", "1", ("test",))
    assert again.name == "made:1"
    for part, other in zip(document.parts, again.parts, strict=True):
        match part, other:
            case TextPart(text), TextPart(text2):
                assert text == text2
            case ImagePart(pixels), ImagePart(pixels2):
                assert pixels2.dtype == np.uint8 and np.array_equal(pixels, pixels2)
            case SignalPart(samples, rate, unit), SignalPart(samples2, rate2, unit2):
                assert samples2.dtype == np.float32 and np.array_equal(samples, samples2) and (rate, unit) == (rate2, unit2)
            case _:
                raise AssertionError("the kind of a part changed")


def test_files_give_back_every_document_in_any_order(directory):
    source = RecordSource(*directory)
    assert len(source) == 12
    for index in np.random.default_rng(0).permutation(12):
        assert same(source[int(index)], make_document(int(index)))
    assert sorted(p.name for p in (directory[0] / "train").iterdir()) == ["a.array_record", "b.array_record"]
    with pytest.raises(IndexError, match="document 12 of 12"):
        source[12]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(version=2), "record version 2"),
        (lambda c: c.pop("parts"), "KeyError"),
        (lambda c: c.update(source=3), "expected str, found int"),
        (lambda c: c["parts"].append(["video", b""]), "unknown part 'video'"),
        (lambda c: c["parts"].append(["image", 4, 4, b"123"]), "cannot reshape"),
        (lambda c: c["parts"].append(["image", 0, 4, b""]), "expected uint8"),
        (lambda c: c["parts"].append(["text", b"bytes"]), "expected str"),
        (lambda c: c["parts"].append(["signal", 1, 1, 1.0, "V", np.float32(np.nan).tobytes()]), "1 values that are not finite"),
        (lambda c: c["parts"].append(["signal", 1, 1, -1.0, "V", np.float32(0).tobytes()]), "sampling rate -1.0"),
    ],
)
def test_every_broken_record_is_refused_with_its_reason(change, reason):
    content = msgpack.unpackb(records.encode(make_document(0)))
    change(content)
    with pytest.raises(DataError, match=reason):
        records.decode(msgpack.packb(content))


def test_random_bytes_are_refused():
    generator = np.random.default_rng(0)
    for length in range(40):
        with pytest.raises(DataError):
            records.decode(generator.bytes(length))


def test_a_document_that_could_not_be_read_is_not_written():
    with pytest.raises(DataError, match="expected uint8"):
        records.encode(Document((ImagePart(np.zeros((2, 2, 3), np.float32)),), "s", "l", "i"))


def test_damage_in_a_file_is_found_and_harms_only_its_record(directory):
    path, files = directory
    victim = path / files[1].name
    data = bytearray(victim.read_bytes())
    # The second document's pixels are random, hence incompressible, so they are in the file as they are.
    position = data.find(make_document(6).parts[1].pixels.tobytes()[:16])
    assert position > 0
    data[position] ^= 0xFF
    victim.write_bytes(data)
    source = RecordSource(path, files)
    with pytest.raises(DataError, match="damaged record"):
        source[6]
    for index in (*range(6), *range(7, 12)):
        assert same(source[index], make_document(index))
    assert source.name(6) == f"{victim}[1]"


def test_truncated_and_missing_files_are_named(directory):
    path, files = directory
    data = (path / files[0].name).read_bytes()
    (path / files[0].name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.array_record has \d+ bytes, but \d+ bytes were written"):
        RecordSource(path, files)
    (path / files[0].name).unlink()
    with pytest.raises(DataError, match=r"a\.array_record is absent"):
        RecordSource(path, files)


def test_quarantine_counts_each_document_once_and_stops_at_the_share():
    quarantine = Quarantine(documents=20, max_share=0.1)
    quarantine.add("a", "torn")
    quarantine.add("a", "torn")
    quarantine.add("b", "burnt")
    assert quarantine.metrics() == {"data/documents": 20.0, "data/quarantined": 2.0}
    assert quarantine.reasons == {"a": "torn", "b": "burnt"}
    with pytest.raises(DataError, match=r"3 of 20 documents are bad, more than the allowed share 0\.1; the last is c: lost"):
        quarantine.add("c", "lost")
