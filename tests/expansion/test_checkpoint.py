"""A manifest and its source give one checkpoint, to the byte, whatever happens in between; bad input writes nothing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from interns1pro_jax.checkpoint import safetensors_writer
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.config import ConfigError, FopeConfig, ModelConfig
from interns1pro_jax.expansion.assignment import ExpansionConfig, assign
from interns1pro_jax.expansion.checkpoint import expand_checkpoint, fingerprint, moe_layers
from interns1pro_jax.expansion.manifest import FILE, Calibration, Manifest
from tests.expansion.conftest import source_config

EXPANSION = ExpansionConfig(growth=2, groups=4, experts_per_token=4, method="random", noise=0.1)


def manifest_of(source, expansion=EXPANSION) -> Manifest:
    config = ModelConfig.from_hf(source)
    slots = assign(expansion, 2, config.text.num_experts)
    return Manifest(fingerprint(open_checkpoint(source), config), expansion, Calibration("0", 7), moe_layers(config), slots)


def grow(source, directory, manifest=None, **options) -> ModelConfig:
    manifest = manifest or manifest_of(source)
    return expand_checkpoint(open_checkpoint(source), ModelConfig.from_hf(source), manifest, directory, max_file_bytes=30_000, **options)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_tensor_is_its_sources(source, tmp_path):
    config, manifest = grow(source, tmp_path), manifest_of(source)
    theirs, ours = open_checkpoint(source), open_checkpoint(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == config
    assert config.text.num_experts == 16 and config.text.router_n_groups == 4 and config.text.num_experts_per_tok == 4
    assert manifest.layers == (1, 2)
    assert sorted(ours) == sorted(name for p in hf_parameters(config) for _, _, name in p.tensors())
    for name in ours:
        head, _, rest = name.partition(".mlp.experts.")
        if rest:
            slot, _, projection = rest.partition(".")
            expert = manifest.slots_LGS[manifest.layers.index(int(head.rpartition(".")[2]))].ravel()[int(slot)]
            assert ours.read(name).tobytes() == theirs.read(f"{head}.mlp.experts.{expert}.{projection}").tobytes()
        elif name.endswith(".mlp.gate.weight"):
            slots = manifest.slots_LGS[manifest.layers.index(int(name.split(".")[3]))].ravel()
            noise = ours.read(name) - theirs.read(name)[slots]
            np.testing.assert_allclose(noise.std(), 0.1 * theirs.read(name).std(), rtol=0.2)
        elif "rotary_emb" in name:
            np.testing.assert_array_equal(ours.read(name), np.broadcast_to(np.eye(5), (2, 5, 5)))
        else:
            assert ours.read(name).tobytes() == theirs.read(name).tobytes()
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def test_the_manifest_rebuilds_the_checkpoint_byte_for_byte(source, tmp_path):
    grow(source, tmp_path / "first")
    manifest = Manifest.load(tmp_path / "first" / FILE)
    assert manifest.fingerprint == manifest_of(source).fingerprint
    grow(source, tmp_path / "second", manifest)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    other = dataclasses.replace(EXPANSION, seed=1)
    grow(source, tmp_path / "third", manifest_of(source, other))
    assert contents(tmp_path / "first") != contents(tmp_path / "third")


def test_an_interrupted_expansion_goes_on(source, tmp_path):
    class Killed(Exception):
        pass

    def kill(what, done, total):
        if what == "writing" and done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        grow(source, tmp_path / "cut", progress=kill)
    complete = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.safetensors")}
    assert complete
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "cut")
    grow(source, tmp_path / "cut")
    grow(source, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in complete.items())


def test_experts_in_one_tensor_are_taken_apart(source, tmp_path):
    stored, fused = open_checkpoint(source), {}
    for name in stored:
        head, is_expert, _ = name.partition(".mlp.experts.")
        if not is_expert:
            fused[name] = stored.read(name)
            continue
        each = [[stored.read(f"{head}.mlp.experts.{e}.{kind}_proj.weight").T for kind in ("gate", "up", "down")] for e in range(8)]
        fused[f"{head}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(parts[:2], -1) for parts in each])
        fused[f"{head}.mlp.experts.down_proj"] = np.stack([parts[2] for parts in each])
    directory = tmp_path / "fused"
    directory.mkdir()
    save_file({name: np.ascontiguousarray(x) for name, x in fused.items()}, directory / "model.safetensors")
    shutil.copy(source / "config.json", directory)
    grow(directory, tmp_path / "from_fused")
    grow(source, tmp_path / "from_single")
    from_fused, from_single = open_checkpoint(tmp_path / "from_fused"), open_checkpoint(tmp_path / "from_single")
    assert {n: from_fused.read(n).tobytes() for n in from_fused} == {n: from_single.read(n).tobytes() for n in from_single}


def test_a_qwen3_moe_grows_into_the_released_layout(source, tmp_path):
    stored = open_checkpoint(source)
    tensors = {name.replace("model.language_model.", "model."): stored.read(name) for name in stored}
    wanted = grow(source, tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    for tied in (False, True):
        if tied:
            del tensors["lm_head.weight"]
        directory = tmp_path / f"qwen3_moe_{tied}"
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(source_config(tie_word_embeddings=tied, family="qwen3_moe").to_hf()))
        assert grow(directory, tmp_path / f"ours_{tied}") == wanted
        ours = open_checkpoint(tmp_path / f"ours_{tied}")
        head = ours.read("model.language_model.embed_tokens.weight" if tied else "lm_head.weight")
        assert ours.read("lm_head.weight").tobytes() == head.tobytes()
        same = [name for name in theirs if name != "lm_head.weight" or not tied]
        assert {n: ours.read(n).tobytes() for n in same} == {n: theirs.read(n).tobytes() for n in same}


def damaged(source, directory, name, value):
    """A copy of the source with one value of one tensor changed."""
    stored = open_checkpoint(source)
    tensors = {name: stored.read(name) for name in stored}
    tensors[name].flat[3] = value
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    shutil.copy(source / "config.json", directory)
    return directory


def test_bad_input_is_named_and_nothing_is_written(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    router, expert = "model.language_model.layers.1.mlp.gate.weight", "model.language_model.layers.2.mlp.experts.5.up_proj.weight"
    other = damaged(source, tmp_path / "other", router, 1.0)
    with pytest.raises(ConfigError, match="the manifest is of another checkpoint"):
        grow(other, target, manifest_of(source))
    manifest = manifest_of(source)
    twice = dataclasses.replace(manifest, slots_LGS=np.where(manifest.slots_LGS == 3, 2, manifest.slots_LGS))
    with pytest.raises(ConfigError, match=r"does not hold each of 8 experts 2 times in layers \[1, 2\]"):
        grow(source, target, twice)
    with pytest.raises(CheckpointError, match=f"NaN or infinite in {expert}"):
        grow(damaged(source, tmp_path / "nan", expert, np.nan), target)
    with pytest.raises(ConfigError, match=r"growth \* experts = 2 \* 8=16 must be divisible by ExpansionConfig.groups=3"):
        ExpansionConfig(growth=2, groups=3, method="copy").target(ModelConfig.from_hf(source))
    assert not list(target.glob("*"))
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"no space for the checkpoint in .*target: it needs [\d,]+ more bytes and 10 are free"):
        grow(source, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format="something"), "format='something' is not"),
        (dict(layers={"1": [[0, 1], [2]]}), "layers must"),
        (dict(layers={"1": [[0.5] * 4] * 4}), "groups of expert ids"),
        (dict(extra=1), "unknown keys"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_file(source, tmp_path, change, message):
    (tmp_path / FILE).write_text(json.dumps(manifest_of(source).to_json() | change))
    with pytest.raises(ConfigError, match=f"{tmp_path / FILE}: .*{message}"):
        Manifest.load(tmp_path / FILE)


def test_coefficients_of_the_paper_where_they_are_asked_for(source, tmp_path):
    noisy = dataclasses.replace(EXPANSION, fope=FopeConfig(init_factor=0.5, sep_head=False))
    grow(source, tmp_path, manifest_of(source, noisy))
    grown = open_checkpoint(tmp_path)
    sines, cosines = (grown.read(f"model.language_model.rotary_emb.{kind}_coef") - np.eye(5) for kind in ("sin", "cos"))
    assert 0.5 * 5**-0.5 / 2 < sines.std() < 2 * 0.5 * 5**-0.5
    assert not np.allclose(sines, cosines)
    kept = dataclasses.replace(EXPANSION, fope=None)
    config = grow(source, tmp_path / "plain", manifest_of(source, kept))
    assert config.text.fope is None and source_config().text.fope is None
