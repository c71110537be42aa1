"""Readers of the sample data on small inputs, the split, and the preparation as a whole with a reader of our own."""

import contextlib
import re

import numpy as np
import pytest
from PIL import Image

from interns1pro_jax.data.records import DataError
from interns1pro_jax.data.samples import molecules, packages, pictures, prepare, prose, signals
from interns1pro_jax.data.samples.packages import PACKAGES, Sample
from interns1pro_jax.data.samples.prepare import SPLITS, SampleData
from interns1pro_jax.data.sources import read_examples

from .conftest import make_document


def test_pins_are_complete():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert re.fullmatch("[0-9a-f]{64}", package.sha256) and package.size > 0 and package.licence and package.origin
        name, version, *_ = package.file.split("-")
        assert (name.replace("_", "-"), version) == (package.name, package.version)


def test_prose_keeps_explanations_and_drops_sessions():
    text = "Solves :math:`x = 1`.\n\n    >>> solve(x)\n    1\n    >>> y\n\n\nMore text.\n>>> z\n2"
    assert prose.without_examples(text) == "Solves :math:`x = 1`.\n\nMore text."
    source = '"""Module."""\nclass A:\n    """Class."""\n    def b(self):\n        """Method."""\ndef c():\n    pass\n'
    assert list(prose._docstrings(source)) == [("", "Module."), ("A", "Class."), ("b", "Method.")]


def test_series_files_are_read_with_channels_gaps_and_labels():
    content = "#about\n@problemName X\n@data\n1,2,3:4,5,6:cat\n7,8,?:9,10,?:dog\n"
    (first, cat), (second, dog) = signals.read_ts(content)
    assert (cat, dog) == ("cat", "dog")
    assert np.array_equal(first, [[1, 4], [2, 5], [3, 6]]) and np.array_equal(second, [[7, 9], [8, 10]])


def test_the_caption_of_a_signal_is_true():
    time = np.arange(200) / 50
    wave = np.sin(2 * np.pi * 3 * time)
    wave[160] = -5
    assert signals._shape(wave[:, None], 50.0) == "Largest deviation: downward, last quarter. Main frequency: 3 Hz"
    assert signals._shape(-wave[::-1][:, None], None) == "Largest deviation: upward, first quarter."


def test_windows_of_a_recording_are_disjoint_and_have_equal_tokens(encoder):
    class Licences:
        def licence(self, package):
            return "CC0-1.0"

    for rate in (1.0, 40.0, 200.0, 360.0):
        recording = signals.Recording("p", "What", "place", 1000.0, 20.0, np.random.default_rng(0).normal(size=9000), rate, "V")
        windows = list(signals._windows(recording, Licences()))
        assert len({sample.document.identifier for sample in windows}) == len(windows) > 3
        for _, document in windows:
            signal = encoder.encode(document).media[0].signal()
            assert signal.tokens == 8 and signal.plan.patch <= 16
    assert "45 Hz (averaged from 360 Hz)" in windows[0].document.parts[2].text


def test_tiles_do_not_overlap_and_looks_are_true():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    assert len(list(pictures._tiles(image))) == 3 * 5
    plain = np.zeros((8, 8, 3), np.uint8)
    assert pictures._look(plain) == "grey, dark, low contrast"
    assert pictures._look(plain + np.array([250, 10, 10], np.uint8)) == "red, medium, low contrast"
    assert pictures._look(plain + np.array([90, 120, 250], np.uint8)).startswith("blue")


def test_drawings_show_heteroatoms_in_their_colours():
    chem = pytest.importorskip("rdkit.Chem")
    rdkit = molecules._rdkit()

    def coloured(smiles):
        pixels = molecules.draw(chem.MolFromSmiles(smiles), 60).astype(int)
        assert pixels.shape == (molecules.DRAWING_SIDE, molecules.DRAWING_SIDE, 3)
        red, green, blue = np.moveaxis(pixels, -1, 0)
        return (red > green + 100).any(), (blue > red + 100).any()

    assert coloured("CCCC") == (False, False)
    assert coloured("CCO") == (True, False)
    assert coloured("CCN") == (False, True)
    caption = molecules._caption(chem.MolFromSmiles("c1ccccc1CO"), "OCc1ccccc1", rdkit)
    assert caption == " Molecule with oxygen; rings: 1. SMILES: OCc1ccccc1"
    assert "with no heteroatoms; rings: 0" in molecules._caption(chem.MolFromSmiles("CC"), "CC", rdkit)


def test_the_split_is_a_function_of_the_group():
    splits = [prepare.split_of(f"group {i}", 0.1) for i in range(5000)]
    assert splits == [prepare.split_of(f"group {i}", 0.1) for i in range(5000)]
    assert 400 < splits.count("validation") < 600
    # A larger share only moves groups into validation.
    larger = [prepare.split_of(f"group {i}", 0.2) for i in range(5000)]
    assert all(b == "validation" for a, b in zip(splits, larger, strict=True) if a == "validation")


@pytest.fixture
def reader(monkeypatch):
    """Preparation with 40 made documents in groups of four instead of the packages."""

    class Reader:
        broken = False

        @staticmethod
        def samples(archives):
            for number in range(39 if Reader.broken else 40):
                document = make_document(number, "text")
                yield Sample(f"group {number // 4}", document)

    monkeypatch.setattr(prepare, "EXPECTED", {"text": prepare.Expectation(Reader.samples, 40, 0.3)})
    monkeypatch.setattr(prepare, "Archives", lambda directory: contextlib.nullcontext())
    monkeypatch.setattr(prepare, "fingerprint", lambda vocab_size, chosen: f"fingerprint {vocab_size}")
    return Reader


def test_preparation_splits_by_group_and_repeats_nothing(reader, tmp_path):
    progress = []
    data = prepare.prepare(tmp_path, tmp_path, 320, lambda source, done: progress.append((source, done)), ["text"])
    assert progress[-1] == ("text", 40)
    names = {split: [example.name for example in read_examples(str(tmp_path / split / "text"))] for split in SPLITS}
    groups = {split: {int(name.partition(":")[2]) // 4 for name in found} for split, found in names.items()}
    assert groups["train"].isdisjoint(groups["validation"]) and len(groups["train"] | groups["validation"]) == 10
    assert data.counts == {split: {"text": len(found)} for split, found in names.items()}
    assert "| text |" in (tmp_path / "SOURCES.md").read_text()
    assert all(package.name in (tmp_path / "SOURCES.md").read_text() for package in packages.PACKAGES)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = prepare.prepare(tmp_path, tmp_path, 320, lambda *_: pytest.fail("read again"), ["text"])
    assert again == SampleData.open(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_damaged_or_outdated_data_is_prepared_again(reader, tmp_path):
    data = prepare.prepare(tmp_path, tmp_path, 320, lambda *_: None, ["text"])
    assert data.is_whole()
    (victim,) = (tmp_path / "train/text/shards").iterdir()
    good = victim.read_bytes()
    victim.write_bytes(good[:-1])
    prepare.prepare(tmp_path, tmp_path, 320, lambda *_: None, ["text"])
    assert victim.read_bytes() == good
    assert prepare.prepare(tmp_path, tmp_path, 300, lambda *_: None, ["text"]).fingerprint == "fingerprint 300"


def test_missing_documents_stop_the_preparation_and_leave_nothing_that_looks_complete(reader, tmp_path):
    prepare.prepare(tmp_path, tmp_path, 320, lambda *_: None, ["text"])
    reader.broken = True
    with pytest.raises(DataError, match="text: 39 documents were found, 40 expected"):
        prepare.prepare(tmp_path, tmp_path, 321, lambda *_: None, ["text"])
    with pytest.raises(DataError, match="holds no sample data"):
        SampleData.open(tmp_path)
