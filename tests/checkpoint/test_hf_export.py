"""Saving in the released layout: there and back equal to the byte, FP8 by the released scheme, complete or absent."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint import safetensors_writer
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.hf_names import POSITION_TABLE
from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.checkpoint.stored_tensors import is_quantized, released_scheme
from interns1pro_jax.checkpoint.weights import read_weights, write_weights
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.ops.quantization import dequantize_blocks, quantize_blocks
from interns1pro_jax.sharding import make_mesh
from tools import convert, inspect_checkpoint


def content(directory):
    checkpoint = open_checkpoint(directory)
    return {name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.items()}


def weights(model):
    return {path: np.asarray(v.get_value()).tobytes() for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("tiny", dict(fsdp=2, expert=2)), ("tiny_fp8", dict(fsdp=2, expert=2)), ("variant_shared_coef_topk", {})],
)
def test_there_and_back_is_the_same_to_the_byte(reference, tmp_path, name, sizes):
    with jax.set_mesh(make_mesh(**sizes)):
        model = load_model(reference / name)
        export_model(model, model.config, tmp_path, like=open_checkpoint(reference / name), carry=reference / name, max_file_bytes=100_000)
    assert content(tmp_path) == content(reference / name)
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(reference / name)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_model_to_follow_everything_has_one_dtype_and_the_table_of_positions(reference, tmp_path, mesh):
    model = load_model(reference / "tiny")
    export_model(model, model.config, tmp_path, dtype="bfloat16")
    stored = open_checkpoint(tmp_path)
    assert {info.dtype for name, info in stored.items() if name != POSITION_TABLE} == {"BF16"}
    released = open_checkpoint(reference / "tiny").read(POSITION_TABLE)
    table = stored.read(POSITION_TABLE)
    assert table.shape == (20000, 1, 128)
    np.testing.assert_allclose(table[: len(released)], released, atol=2e-5)
    again = load_model(tmp_path)
    assert weights(again) == weights(load_model(reference / "tiny", dtype="bfloat16", param_dtype="bfloat16"))


def test_fp8_is_the_released_scheme(reference, tmp_path, mesh):
    model = load_model(reference / "tiny_fp8")
    assert sorted(released_scheme(model.config).modules_to_not_convert) == sorted(model.config.quantization.modules_to_not_convert)
    export_model(model, model.config, tmp_path)
    assert weights(load_model(tmp_path)) == weights(model)  # what FP8 can hold, it holds exactly
    stored = open_checkpoint(tmp_path)
    scales = [stored.read(name) for name in stored if name.endswith("_scale_inv")]
    assert scales and all((np.frexp(scale)[0] == 0.5).all() for scale in scales)


def test_what_is_quantised_is_what_the_release_quantises(reference):
    scheme = released_scheme(ModelConfig.from_hf(reference / "official"))
    official = json.loads((reference / "official" / "config.json").read_text())
    assert set(scheme.modules_to_not_convert) == set(official["quantization_config"]["modules_to_not_convert"])
    patterns = json.loads((reference / "key_patterns.json").read_text())["patterns"]
    assert {expected["fp8"] for expected in patterns.values()} == {True, False}
    for pattern, expected in patterns.items():
        for layer, expert in ((0, 0), (93, 511)):
            name = pattern.replace("{L}", str(layer)).replace("{E}", str(expert)).replace("{B}", str(layer % 24))
            assert is_quantized(name, scheme) == expected["fp8"], name
            assert not is_quantized(name, None)


def test_a_block_keeps_its_scale_iff_that_is_exact():
    values = jax.random.normal(jax.random.key(0), (200, 300))
    quantized, scale = quantize_blocks(values)
    exact = dequantize_blocks(quantized, scale)
    # A scale 4096 times as large loses most of the values, and one 16 times as small cannot hold the largest.
    again, kept = quantize_blocks(exact, keep=scale.at[0, 1].mul(2.0**12).at[1, 2].mul(2.0**-4))
    np.testing.assert_array_equal(dequantize_blocks(again, kept), exact)
    np.testing.assert_array_equal(
        kept, quantize_blocks(exact)[1].at[0, 0].set(scale[0, 0]).at[0, 2].set(scale[0, 2]).at[1, :2].set(scale[1, :2])
    )
    even = jnp.where(jnp.abs(exact) < jnp.abs(exact).max() / 16, 0, exact)
    again, kept = quantize_blocks(even, keep=2 * scale)
    np.testing.assert_array_equal(kept, 2 * scale)
    np.testing.assert_array_equal(dequantize_blocks(again, kept), even)
    _, unknown = quantize_blocks(exact, keep=jnp.zeros_like(scale))
    np.testing.assert_array_equal(unknown, quantize_blocks(exact)[1])


def test_an_interrupted_export_goes_on_and_is_no_checkpoint_before(reference, tmp_path, mesh):
    model = load_model(reference / "variant_plain_rope_2per_group")
    options = dict(like=open_checkpoint(reference / "variant_plain_rope_2per_group"), max_file_bytes=20_000, identity="run 1")

    class Killed(Exception):
        pass

    def kill(done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        export_model(model, model.config, tmp_path, progress=kill, **options)
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert complete
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="unfinished export of something else"):
        export_model(model, model.config, tmp_path, **options | dict(identity="run 2"))
    export_model(model, model.config, tmp_path, **options)
    assert content(tmp_path) == content(reference / "variant_plain_rope_2per_group")
    assert {path: path.stat().st_mtime_ns for path in complete} == complete


def test_nothing_is_written_where_something_is_wrong(reference, tmp_path, mesh, monkeypatch):
    model = load_model(reference / "variant_shared_coef_topk")
    target = tmp_path / "out"
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"no space .* needs [\d,]+ more bytes and 1 are free"):
        export_model(model, model.config, target)
    monkeypatch.undo()
    assert not list(target.iterdir())
    (target / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds config\.json already"):
        export_model(model, model.config, target)
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not made with this config"):
        export_model(model, load_model(reference / "tiny_bf16").config, target)
    model.text.final_norm_D[...] = model.text.final_norm_D[...].at[3].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"NaN or infinite in text\.final_norm_D"):
        export_model(model, model.config, target)
    assert not list(target.iterdir())
    with pytest.raises(CheckpointError, match=r"tiny is of another model \(model\.\S+ is surplus.*follow a checkpoint of the same"):
        other = load_model(reference / "variant_plain_rope_2per_group")
        export_model(other, other.config, target, like=open_checkpoint(reference / "tiny"))
    assert not list(target.iterdir())


def test_weights_of_a_run_on_another_mesh(reference, tmp_path):
    with jax.set_mesh(make_mesh(fsdp=4, expert=2)):
        model = load_model(reference / "variant_plain_rope_2per_group")
        params, buffers = nnx.state(model, nnx.Param, ...)
        identity = {"model": json.loads(json.dumps(dataclasses.asdict(model.config))), "seed": 1}
        with CheckpointManager(tmp_path / "run", identity) as manager:
            for step in (1, 2):
                manager.save(step, {"params": params, "buffers": buffers, "opt_state": {"mu": params}, "step": jnp.int32(step)})
        write_weights(tmp_path / "alone", model, 7)
    with jax.set_mesh(make_mesh(fsdp=2)):
        for directory, step in ((tmp_path / "run", 2), (tmp_path / "alone", 7)):
            again, found = read_weights(directory)
            assert found == step and again.config == model.config and weights(again) == weights(model)
        assert read_weights(tmp_path / "run", 1)[1] == 1
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has \[1, 2\]"):
            read_weights(tmp_path / "run", 5)
        (tmp_path / "run" / "00000002" / "manifest" / "metadata").write_text("")
        with pytest.raises(
            CheckpointError, match=r"00000002 is damaged \(manifest/metadata has 0 bytes .+give another step \(here: \[1, 2\]"
        ):
            read_weights(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"holds checkpoints already \(00000001, 00000002\); choose an empty directory"):
            write_weights(tmp_path / "run", again)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["00000001", "00000002"]


def test_the_commands(reference, tmp_path, capsys):
    source = reference / "tiny_fp8"
    assert convert.main([str(source), str(tmp_path / "run")]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "out"), "--like", str(source), "--carry", str(source)]) == 0
    assert inspect_checkpoint.main([str(tmp_path / "out"), "--against", str(source)]) == 0
    assert "100 tensors are equal to the byte, 0 differences" in capsys.readouterr().out
    assert inspect_checkpoint.main([str(tmp_path / "run")]) == 0
    assert "1,733,144 elements in bfloat16" in capsys.readouterr().out
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "plain"), "--quantization", "none"]) == 0
    assert inspect_checkpoint.main([str(tmp_path / "plain"), "--against", str(source)]) == 1
    assert "is only in" in capsys.readouterr().out
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "choose an empty directory" in capsys.readouterr().err
    assert inspect_checkpoint.main([str(tmp_path / "absent")]) == 2
    for options in (["--quantization", "fp8"], ["--carry", str(source)], ["--step", "3"]):
        assert convert.main([str(source), str(tmp_path / "more"), *options]) == 1
        assert f"{options[0]} {options[1]} has no effect" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    (tmp_path / "run" / "00000000" / "manifest" / "metadata").write_text("{}")
    assert inspect_checkpoint.main([str(tmp_path / "run")]) == 2
    assert "00000000 cannot be read ('identity'); choose another with --step" in capsys.readouterr().err


def test_differences_are_found_in_every_part(monkeypatch):
    monkeypatch.setattr(inspect_checkpoint, "_COMPARED", 3)
    x = np.arange(10.0).reshape(2, 5)
    for place, value in (((0, 1), 40.0), ((1, 4), -2.5), ((0, 3), np.nan)):
        y = x.copy()
        y[place] = value
        np.testing.assert_equal(inspect_checkpoint._largest_difference(x, y), abs(value - x[place]))
    assert inspect_checkpoint._largest_difference(x, x) == 0 == inspect_checkpoint._largest_difference(x[:0], x[:0])
