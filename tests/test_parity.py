"""The model agrees with every golden of the official implementation; and the comparison notices what it should."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.models.vision_inputs import VisionItem
from interns1pro_jax.sharding import make_mesh
from tests.conftest import REFERENCE
from tools.parity import plan
from tools.parity.media import vision_rows
from tools.parity.subject import Subject

SMALL, GOLDEN = "variant_plain_rope_2per_group", "text_ragged.npz"
ARRAYS = ("hidden_states", "attn_out", "mlp_out", "final_norm", "logits", "rope_cos", "router_logits", "router_weights")


def _by_directory() -> dict[str, list[Path]]:
    """The files to check, by the checkpoint that they belong to, so that its models are loaded once."""
    together: dict[str, list[Path]] = defaultdict(list)
    for path in plan.files(REFERENCE)[0] if REFERENCE.is_dir() else ():
        together[(plan.subject_directory(REFERENCE, path) or path.parent).relative_to(REFERENCE).as_posix()].append(path)
    return together


FILES = _by_directory()


@pytest.fixture(autouse=True)
def precise():
    """Full float32 products on one device."""
    with jax.default_matmul_precision("highest"), jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.mark.parametrize("directory", FILES)
def test_goldens(directory):
    rows = list(plan.run(REFERENCE, FILES[directory]))
    assert len(rows) == len(FILES[directory]) > 0
    failures = [f"{row.file}: {text}" for row in rows for text in row.problems]
    assert not failures, "\n".join(failures)


def test_no_golden_is_left_out(reference):
    assert plan.files(reference)[2] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Subject:
    """A copy of a small checkpoint, in a directory of another name, one level deeper."""
    if not REFERENCE.is_dir():
        pytest.skip("needs the golden data")
    directory = tmp_path_factory.mktemp("reference") / "deeper" / "other"
    shutil.copytree(REFERENCE / SMALL, directory, copy_function=shutil.copyfile)
    return Subject(directory)


def _check(subject: Subject, **changes: np.ndarray | None) -> list[str]:
    """Problems of the forward pass's golden, with some arrays changed, added or (None) removed; without its generated tokens."""
    with np.load(REFERENCE / SMALL / GOLDEN) as stored:
        arrays = dict(stored) | {"generated": None, "generated_logits": None} | changes
    path = subject.directory / GOLDEN
    path.unlink(missing_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return plan.check_file(subject.directory.parents[1], path, subject).problems


@pytest.mark.parametrize("name", ARRAYS)
def test_a_perturbed_array_is_named(small, name):
    with np.load(REFERENCE / SMALL / GOLDEN) as stored:
        array = stored[name].copy()
    array[(0,) * array.ndim] += 3e-4  # the first token is valid
    (problem,) = _check(small, **{name: array})
    assert problem.startswith(f"{name}: error 0.000") and "; 1 of " in problem


def test_a_wrong_expert_is_reported(small):
    with np.load(REFERENCE / SMALL / GOLDEN) as stored:
        chosen = stored["router_indices"].copy()
    chosen[0, 0, 0] = next(expert for expert in range(4) if expert not in chosen[0, 0])
    problems = _check(small, router_indices=chosen)
    assert any(problem.startswith("router_indices: 1 of ") for problem in problems), problems


def test_an_array_of_another_shape_is_named(small):
    (problem,) = _check(small, final_norm=np.zeros((1, 2, 3), np.float32))
    assert problem.startswith("final_norm: shape (1, 2, 3), ours is ")


def test_an_uncovered_array_is_named(small):
    assert _check(small, surprise=np.zeros(3)) == ["not covered: surprise"]


def test_optional_arrays_may_be_absent(small):
    absent = ("hidden_states", "lengths", "moe_layers", "position_ids", "router_logits", "router_weights", "rope_cos")
    assert _check(small, **dict.fromkeys(absent)) == []


def test_a_missing_input_and_a_damaged_file_fail_the_row(small):
    (problem,) = _check(small, input_ids=None)
    assert "text_ragged.npz lacks array 'input_ids'" in problem
    path = small.directory / GOLDEN
    path.write_bytes(b"damaged")
    assert plan.check_file(small.directory.parents[1], path, small).problems


def test_an_unknown_file_is_reported(tmp_path):
    checkpoint = tmp_path / "a" / "b"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "text_new.npz", "surprise.npz"):
        (checkpoint / name).touch()
    (tmp_path / "surprise.json").touch()
    checked, later, unknown = plan.files(tmp_path)
    assert [path.name for path in checked] == ["config.json", "model.safetensors", "text_new.npz"]
    assert later == [] and unknown == [checkpoint / "surprise.npz", tmp_path / "surprise.json"]


@pytest.mark.parametrize("leaf", ["shape", "count", "fp8", "scale_shape"])
def test_a_changed_name_pattern_is_reported(reference, tmp_path, leaf):
    content = json.loads((reference / "key_patterns.json").read_text())
    name = "model.language_model.layers.{L}.self_attn.k_proj.weight"
    content["patterns"][name][leaf] = [7, 7] if leaf.endswith("shape") else 7
    (tmp_path / "key_patterns.json").write_text(json.dumps(content))
    shutil.copytree(reference / "official", tmp_path / "released", copy_function=shutil.copyfile)
    row = plan.check_file(tmp_path, tmp_path / "key_patterns.json", Subject(tmp_path))
    assert len(row.problems) == 1 and row.problems[0].startswith(f"patterns/{name}/{leaf}: ")


def test_changed_texts_are_reported(reference, tmp_path):
    shutil.copytree(reference / "official", tmp_path / "released", copy_function=shutil.copyfile)
    for name, change, problem in (
        ("tokenizer.json", lambda content: content["cases"][0]["tokens"].append("x"), "cases/0/tokens: "),
        ("tokenizer.json", lambda content: content["cases"][0].update(decoded="x"), "cases/0/decoded: "),
        ("chat_template.json", lambda content: content[0].update(rendered="x"), "0/rendered: "),
        ("sentencepiece_segments.json", lambda content: content[0]["piece_ids"].reverse(), "0/piece_ids: "),
    ):
        content = json.loads((reference / "preprocess" / name).read_text())
        change(content)
        (tmp_path / name).write_text(json.dumps(content))
        row = plan.check_file(tmp_path, tmp_path / name, Subject(tmp_path))
        assert row.problems and all(text.startswith(problem) for text in row.problems), row.problems


def _item(number: int, grid: tuple[int, int, int]) -> VisionItem:
    """Patches that hold the item's number, and each its own."""
    patches = np.arange(np.prod(grid), dtype=np.float32)
    return VisionItem(np.stack([np.full_like(patches, number), patches], -1), grid)


def test_images_and_videos_are_brought_into_one_reading_order():
    config = ModelConfig()
    image, video = [config.image_token_id], [config.video_token_id]
    tokens = np.array([[1, *video * 2, 2, *image, 3, *video * 2, 0], [*image * 2, 4, *video, 5, *video, 0, 0, 0]])
    images, videos = [_item(0, (1, 2, 2)), _item(1, (1, 2, 4))], [_item(2, (2, 4, 2)), _item(3, (2, 2, 2))]
    rows = vision_rows(tokens, images, videos, config)
    first = [[(int(item.patches[0, 0]), int(item.patches[0, 1])) for item in row] for row in rows]
    assert first == [[(2, 0), (0, 0), (2, 8)], [(1, 0), (3, 0), (3, 4)]]
    assert [[item.grid for item in row] for row in rows] == [[(1, 4, 2), (1, 2, 2), (1, 4, 2)], [(1, 2, 4), (1, 2, 2), (1, 2, 2)]]


def test_placeholders_must_fit_their_contents():
    config = ModelConfig()
    image, video = config.image_token_id, config.video_token_id
    with pytest.raises(ValueError, match=f"2 placeholders of id {image}, but the contents give 1 embeddings"):
        vision_rows(np.array([[image, 1, image]]), [_item(0, (1, 2, 2))], [], config)
    with pytest.raises(ValueError, match="the 2 placeholders of one item are not together"):
        vision_rows(np.array([[image, video, image]]), [_item(0, (1, 2, 4))], [_item(1, (1, 2, 2))], config)
