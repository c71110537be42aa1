import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFile, open_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def sample():
    values = np.arange(24).reshape(2, 3, 4)
    tensors = {f"of.{name}": values.astype(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    tensors["of.F8_E8M0"] = (2.0 ** np.arange(-3, 3)).astype(ml_dtypes.float8_e8m0fnu)
    return tensors | {"scalar": np.array(3.0), "empty": np.zeros((2, 0, 5), np.int8), "odd": np.ones(3, np.uint8), "after": np.ones(2)}


def test_reads_what_was_written_whole_and_in_slices(tmp_path, write_safetensors):
    file = SafetensorsFile(write_safetensors(tmp_path / SINGLE, sample()))
    assert set(file) == set(sample())
    for name, values in sample().items():
        read = file.read(name)
        assert read.dtype == values.dtype and read.shape == values.shape and read.tobytes() == values.tobytes()
    part = file.read("of.BF16", (slice(1, 2), slice(0, 3), slice(1, 3)))
    np.testing.assert_array_equal(part, sample()["of.BF16"][1:2, :, 1:3])


def test_agrees_with_the_safetensors_library(reference):
    library = pytest.importorskip("safetensors.numpy").load_file(reference / "tiny" / SINGLE)
    checkpoint = open_checkpoint(reference / "tiny")
    assert set(checkpoint) == set(library)
    assert all(np.array_equal(checkpoint.read(name), values) for name, values in library.items())


def test_a_slice_of_a_tensor_far_larger_than_memory_is_read(tmp_path, write_safetensors):
    size = 2**38

    def grow(header):
        header["huge"] = {"dtype": "U8", "shape": [2**20, 2**18], "data_offsets": [0, size]}

    path = write_safetensors(tmp_path / SINGLE, {}, grow)
    os.truncate(path, path.stat().st_size + size)  # a sparse file: takes no space
    assert SafetensorsFile(path).read("huge", (slice(2**19, 2**19 + 4), slice(7, 9))).tolist() == [[0, 0]] * 4


def test_what_was_read_does_not_stay_resident(tmp_path, write_safetensors):
    if not (smaps := Path("/proc/self/smaps")).exists():
        pytest.skip("needs Linux's /proc/self/smaps")
    path = write_safetensors(tmp_path / SINGLE, {"a": np.ones(2**20), "b": np.ones(2**20)})
    file = SafetensorsFile(path)
    assert file.read("a").sum() + file.read("b", (slice(100, 2**20),)).sum() == 2**21 - 100
    (mapping,) = (entry for entry in smaps.read_text().split("VmFlags") if str(path) in entry)
    (resident,) = re.findall(r"^Rss: +(\d+) kB", mapping.split(str(path))[1], re.MULTILINE)
    assert int(resident) < 100


def header_change(name, **fields):
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header_change("b", dtype="F4"), "tensor 'b' as 'F4'"),
        (header_change("b", dtype=["F32"]), "tensor 'b' as"),
        (header_change("b", shape=[2, -3]), "tensor 'b' has shape"),
        (header_change("b", shape=[2, 4]), "tensor 'b' of shape .* needs 32 bytes"),
        (header_change("b", data_offsets=[0, 24]), "tensor 'b' overlaps"),
        (header_change("b", data_offsets=[24, 48]), "'b' ends at byte .* the file has"),
        (header_change("a", shape=[3], data_offsets=[4, 16]), "tensor 'a' leaves 4 bytes"),
        (lambda header: header.pop("b"), "24 bytes after the last tensor"),
        (lambda header: header["b"].pop("shape"), "tensor 'b' needs dtype, shape"),
    ],
)
def test_a_damaged_header_names_the_tensor(tmp_path, write_safetensors, change, message):
    path = write_safetensors(tmp_path / SINGLE, {"a": np.ones(4, np.float32), "b": np.ones((2, 3), np.float32)}, change)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_an_error(tmp_path, write_safetensors):
    path = write_safetensors(tmp_path / SINGLE, {"a": np.ones(4, np.float32), "b": np.ones((2, 3), np.float32)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated" if length else "0 bytes"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((2**60).to_bytes(8, "little") + b"{}", "above the limit"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"{a", "not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "not JSON"),
        ((17).to_bytes(8, "little") + b'{"a": 1, "a": 2 }', "names 'a' twice"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.fixture
def shards(tmp_path, write_safetensors):
    """Writes two shards of a checkpoint and an index; returns a function that writes the index anew."""
    write_safetensors(tmp_path / "1.safetensors", {"a": np.zeros(2)})
    write_safetensors(tmp_path / "2.safetensors", {"b": np.ones(2), "c": np.ones(3)})

    def index(**change):
        where = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"} | change
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: file for name, file in where.items() if file}}))

    index()
    return index


def test_a_sharded_checkpoint_is_one(tmp_path, shards):
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"a", "b", "c"} and checkpoint.read("c").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": "2.safetensors"}, "2.safetensors lacks tensor 'd'"),
        ({"d": "3.safetensors"}, "3.safetensors cannot be read: No such file"),
        ({"a": "2.safetensors"}, "2.safetensors lacks tensor 'a'"),
        ({"c": "1.safetensors"}, "places tensor 'c' in 1.safetensors, but 2.safetensors holds it"),
        ({"c": None}, "holds 'c', which .* does not list"),
        ({"c": "../2.safetensors"}, "only names of files in the same directory"),
    ],
)
def test_an_index_that_does_not_fit_the_shards(tmp_path, shards, change, message):
    shards(**change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path, shards, write_safetensors):
    write_safetensors(tmp_path / "1.safetensors", {"a": np.zeros(2), "b": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensor 'b' is in two files, 1.safetensors and 2.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_no_checkpoint_or_two(tmp_path, shards, write_safetensors):
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path / "elsewhere")
    write_safetensors(tmp_path / SINGLE, {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="both"):
        open_checkpoint(tmp_path)
