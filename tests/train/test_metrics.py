"""What the writers of scalars leave on disk."""

import json
import struct

import numpy as np
from tensorboardX.proto import event_pb2

from interns1pro_jax.train.metrics import JsonLines, TensorBoard, read_arrays, read_records, write_npz


def events(directory):
    """Events of all files in the order of writing: length, its checksum, content, its checksum."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            found.append(event_pb2.Event.FromString(content[start + 12 : start + 12 + length]))
            start += length + 16
    return found


def write(kind, directory, after, steps):
    writer = kind(directory)
    writer.start(after)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "eval/loss": float("nan")})
    writer.flush()
    writer.close()


def test_json_lines_have_each_step_once_and_floats_exactly(tmp_path):
    write(JsonLines, tmp_path, 0, range(1, 8))
    write(JsonLines, tmp_path, 3, range(4, 6))
    assert read_records(tmp_path) == [{"step": step, "loss": 1 / step, "eval/loss": None} for step in range(1, 6)]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: 1 / 0)  # nothing that only Python takes for JSON
    write(JsonLines, tmp_path, 0, [])
    assert read_records(tmp_path) == []


def test_tensorboard_is_told_what_to_forget(tmp_path):
    write(TensorBoard, tmp_path, 0, range(1, 4))
    write(TensorBoard, tmp_path, 2, range(3, 5))
    found = events(tmp_path)
    starts = [event.step for event in found if event.session_log.status == event_pb2.SessionLog.START]
    scalars = [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in found if event.HasField("summary")]
    assert starts == [1, 3]
    assert [step for step, _ in scalars] == [1, 2, 3, 3, 4]
    assert all(values["loss"] == np.float32(1 / step) and np.isnan(values["eval/loss"]) for step, values in scalars)


def test_arrays_come_back(tmp_path):
    arrays = {"router/load": np.arange(6, dtype=np.float32).reshape(2, 3), "file": np.ones(2)}
    write_npz(tmp_path / "arrays.npz", arrays)
    np.testing.assert_equal(read_arrays(tmp_path), arrays)
    assert read_arrays(tmp_path / "elsewhere") == {}
