"""Conversions without a model: the same bytes as with one, a few boxes at a time, complete or absent."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint import checksums, manager, stream
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.checkpoint.safetensors_io import SafetensorsFile, open_checkpoint
from interns1pro_jax.checkpoint.sources import HfSource, RunSource
from interns1pro_jax.checkpoint.stream import write_hf, write_run
from interns1pro_jax.checkpoint.weights import read_weights, write_weights
from interns1pro_jax.config import LoraConfig, ModelConfig
from interns1pro_jax.layers.lora import Adapter
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from tests.tiny import text_only
from tools import inspect_checkpoint

SMALL = "variant_plain_rope_2per_group"


def source_of(directory, **dtypes):
    return HfSource(open_checkpoint(directory), ModelConfig.from_hf(directory).with_dtypes(**dtypes))


def weights(model):
    return {path: np.asarray(v.get_value()).tobytes() for path, v in nnx.to_flat_state(nnx.state(model))}


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def small_boxes(monkeypatch, size=4096):
    """Boxes so small that all rules for cutting apply; returns the sizes of what was read."""
    read, sizes = HfSource.read, []

    def note(self, parameter, box):
        sizes.append((result := read(self, parameter, box)).nbytes)
        return result

    monkeypatch.setattr(stream, "_BOX", size)
    monkeypatch.setattr(HfSource, "read", note)
    return sizes


@pytest.mark.parametrize("name", [SMALL, "tiny_fp8"])
def test_a_run_s_checkpoint_holds_what_the_model_would(reference, tmp_path, monkeypatch, name):
    sizes = small_boxes(monkeypatch)
    write_run(source_of(reference / name), tmp_path / "run", 7)
    matrix = max(np.prod(p.shape[len(p.stack) :]) * 4 for p in stream.hf_parameters(ModelConfig.from_hf(reference / name)) if p.stack)
    assert max(sizes) <= 4 * matrix  # of what is in one tensor no more than a box is read at once
    with jax.set_mesh(make_mesh(fsdp=2)):
        again, step = read_weights(tmp_path / "run")
        assert step == 7 and weights(again) == weights(load_model(reference / name))
    assert inspect_checkpoint.main([str(tmp_path / "run"), "--verify"]) == 0


def test_a_sharded_run_s_checkpoint_becomes_the_released_layout(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "_CHUNK", 1024)
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        write_weights(tmp_path / "run", load_model(reference / SMALL), 3)
    monkeypatch.setattr(stream, "_BOX", 4096)
    source = RunSource(tmp_path / "run")
    (experts,) = (p for p in stream.hf_parameters(source.config) if p.path.endswith("wi_EDF"))
    assert source._chunk(experts)[0] == 1 < experts.shape[0] and source.times_read() < 2
    write_hf(source, source.config, tmp_path / "out", max_file_bytes=20_000)
    assert checksums.differing(tmp_path / "out") == []
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(reference / SMALL)
    assert {name: ours.read(name).tobytes() for name in ours} == {name: theirs.read(name).tobytes() for name in theirs}
    assert ModelConfig.from_hf(tmp_path / "out") == ModelConfig.from_hf(reference / SMALL)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_a_run_that_trained_a_part_is_read_whole_and_merged(tmp_path, monkeypatch, mesh, lora):
    config = text_only(lora=lora)
    model = create_model(config)
    adapters = nnx.state(model, Adapter)
    nnx.update(model, jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) / 4, adapters))  # B begins as zeros
    trained = (lambda path, _: "moe" in path) if lora is None else Adapter
    params, buffers = nnx.state(model, trained, ...)
    with CheckpointManager(tmp_path / "run", {"model": json.loads(json.dumps(dataclasses.asdict(config)))}, keep_last=1) as run:
        run.save(3, {"params": params, "buffers": buffers})
    expected, _ = read_weights(tmp_path / "run")
    monkeypatch.setattr(stream, "_BOX", 4096)
    source = RunSource(tmp_path / "run")
    write_run(source, tmp_path / "orbax")
    write_hf(source, source.config, tmp_path / "hf", max_file_bytes=20_000)
    base = dict(nnx.to_flat_state(nnx.state(model)))
    for again in (read_weights(tmp_path / "orbax")[0], load_model(tmp_path / "hf")):
        assert again.config.text.lora is None
        found = dict(nnx.to_flat_state(nnx.state(again)))
        changed = {path for path, x in found.items() if not np.array_equal(x[...], base[path][...])}
        assert {path[-1] for path in changed} == ({"q_DQH", "k_DKH", "v_DKH", "o_QHD", "wi_EDF", "wo_EFD"} if lora else set())
        for path, x in nnx.to_flat_state(nnx.state(expected)):
            np.testing.assert_allclose(found.pop(path)[...], x[...], rtol=0, atol=1e-6 if path in changed else 0, err_msg=str(path))
        assert not found


def test_fp8_is_the_released_scheme(reference, tmp_path, mesh):
    model = load_model(reference / "tiny_fp8")
    write_hf(source_of(reference / "tiny_fp8"), model.config, tmp_path)
    assert weights(load_model(tmp_path)) == weights(model)  # what FP8 can hold, it holds exactly
    stored = open_checkpoint(tmp_path)
    scales = [stored.read(name) for name in stored if name.endswith("_scale_inv")]
    assert scales and all((np.frexp(scale)[0] == 0.5).all() for scale in scales)


@pytest.fixture
def fp8_layouts(reference, tmp_path, write_safetensors):
    """The same FP8 model with an expert in a tensor of its own, and with all of a layer in one, [in, out] and [out, in].

    Blocks of 64 instead of 128, which do not divide the columns of gate | up and would mix the two."""
    stored = open_checkpoint(reference / "tiny_fp8")
    tensors = {name: stored.read(name) for name in stored}
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        rows, columns = (-(-size // 64) for size in tensors[name.removesuffix("_scale_inv")].shape)
        tensors[name] = tensors[name].repeat(2, 0).repeat(2, 1)[:rows, :columns]
    config = json.loads((reference / "tiny_fp8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    layouts = {"separate": tensors}
    for layout, axis in (("fused", -1), ("fused_transposed", -2)):
        fused = {name: values for name, values in tensors.items() if ".experts." not in name}
        for layer in range(config["text_config"]["num_hidden_layers"]):
            where = f"model.language_model.layers.{layer}.mlp.experts."
            for suffix in ("", "_scale_inv"):
                gate, up, down = (
                    np.stack([tensors[f"{where}{e}.{kind}_proj.weight{suffix}"] for e in range(config["text_config"]["num_experts"])])
                    for kind in ("gate", "up", "down")
                )
                gate, up, down = (x.swapaxes(1, 2) if axis == -1 else x for x in (gate, up, down))
                fused |= {f"{where}gate_up_proj{suffix}": np.concatenate([gate, up], axis), f"{where}down_proj{suffix}": down}
        layouts[layout] = fused
    for layout, values in layouts.items():
        (tmp_path / layout).mkdir()
        write_safetensors(tmp_path / layout / "model.safetensors", {name: np.ascontiguousarray(x) for name, x in values.items()})
        (tmp_path / layout / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("layout", ["fused", "fused_transposed"])
def test_fp8_experts_in_one_tensor_go_both_ways_to_the_byte(fp8_layouts, mesh, layout):
    def tensors(name):
        checkpoint = open_checkpoint(fp8_layouts / name)
        return {name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.items()}

    assert (
        sum(".experts.gate_up_proj" in name for name in tensors(layout))
        == 2 * ModelConfig.from_hf(fp8_layouts / layout).text.num_moe_layers
    )
    for number, (source, like) in enumerate(((layout, layout), ("separate", layout), (layout, "separate"))):
        taken = source_of(fp8_layouts / source)
        write_hf(taken, taken.config, fp8_layouts / str(number), like=open_checkpoint(fp8_layouts / like))
        assert tensors(str(number)) == tensors(like)
    model = load_model(fp8_layouts / layout)
    export_model(model, model.config, fp8_layouts / "model", like=open_checkpoint(fp8_layouts / layout))
    assert tensors("model") == tensors(layout)
    # Of weights without FP8 before, in the layout that is followed.
    plain, scheme = dataclasses.replace(model.config, quantization=None), model.config
    write_hf(source_of(fp8_layouts / layout), plain, fp8_layouts / "plain", dtype="float32", like=None)
    write_hf(source_of(fp8_layouts / "plain"), scheme, fp8_layouts / "quantised", like=open_checkpoint(fp8_layouts / layout))
    assert tensors("quantised") == tensors(layout)


@pytest.mark.parametrize("size", [20_000, 300_000])  # in the smaller files a matrix and its scales are apart
def test_processes_make_and_read_files_of_their_own(reference, tmp_path, monkeypatch, size):
    """Two processes, one after the other in this one: all is written once, and each reads what it writes."""
    read, plain = [], SafetensorsFile.read

    def note(self, name, index=None):
        values = plain(self, name, index)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(SafetensorsFile, "read", note)
    monkeypatch.setattr(stream, "_BOX", 4096)  # small beside a file, as always
    directory = reference / "tiny_fp8"
    options = dict(like=open_checkpoint(directory), max_file_bytes=size, carry=directory)
    source = source_of(directory)
    write_hf(source, source.config, tmp_path / "one", **options)
    alone, totals = sum(read), []
    monkeypatch.setattr(stream, "first_alone", lambda work: work() if not totals else None)
    monkeypatch.setattr(stream, "barrier", lambda where: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):  # the first one completes the checkpoint
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        read.clear()
        write_hf(source, source.config, tmp_path / "two", **options)
        totals.append(sum(read))
        assert (tmp_path / "two" / "config.json").exists() == (process == 0)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    if size == 300_000:
        assert max(totals) < 0.7 * alone and sum(totals) < 1.25 * alone  # experts at the ends of files are read twice


def test_an_interrupted_conversion_goes_on(reference, tmp_path):
    source = source_of(reference / SMALL)

    class Killed(Exception):
        pass

    first = []

    def kill(what, done, total):
        first.append(total)
        if what == "writing" and done > total / 2:
            raise Killed

    for write, target in (
        (lambda path, **options: write_run(source, path, **options), "run"),
        (lambda path, **options: write_hf(source, source.config, path, max_file_bytes=20_000, **options), "hf"),
    ):
        with pytest.raises(Killed):
            write(tmp_path / target, progress=kill)
        files = [path for path in (tmp_path / target).rglob("*") if path.is_file() and "partial" not in path.name]
        complete = {path: path.stat().st_mtime_ns for path in files if path.name not in ("convert.json", "_METADATA", "metadata")}
        assert complete and not list((tmp_path / target).glob("0*[0-9]")) and not (tmp_path / target / "config.json").exists()
        started = []

        def kill_late(what, done, total, started=started):
            started.append((what, total))
            if what == "checksums":
                raise Killed

        with pytest.raises(Killed):
            write(tmp_path / target, progress=kill_late)
        last = []
        write(tmp_path / target, progress=lambda what, done, total, last=last: last.append(what))
        assert set(last) == {"checksums"}  # all was written before
        write(tmp_path / f"{target}_whole")
        assert content(tmp_path / target) == content(tmp_path / f"{target}_whole")
        assert max(total for what, total in started if what == "writing") < first[-1]
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / target).rglob("*") if path.is_file()}
        kept = [path for path in complete if times.get(tmp_path / target / path.relative_to(tmp_path / target)) == complete[path]]
        assert target == "run" or kept


def test_another_source_does_not_go_on(reference, tmp_path):
    def kill(what, done, total):
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_run(source_of(reference / SMALL), tmp_path, progress=kill)
    with pytest.raises(CheckpointError, match=r"00000000\.partial is an unfinished conversion of something else"):
        write_run(source_of(reference / "variant_shared_coef_topk"), tmp_path)


def test_bad_input_is_named_and_nothing_is_written(reference, tmp_path, monkeypatch, write_safetensors):
    checkpoint = open_checkpoint(reference / SMALL)
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    name = "model.language_model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[5] = np.nan
    (tmp_path / "nan").mkdir()
    write_safetensors(tmp_path / "nan" / "model.safetensors", tensors)
    shutil.copy(reference / SMALL / "config.json", tmp_path / "nan")
    bad, good = source_of(tmp_path / "nan"), source_of(reference / SMALL)
    monkeypatch.setattr(stream, "_BOX", 512)  # an expert at a time
    for source, message in ((bad, f"NaN or infinite in {name}"), (good, r"no space .* needs [\d,]+ more bytes and 1 are free")):
        if source is good:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(CheckpointError, match=message):
            write_run(source, tmp_path / "run")
        with pytest.raises(CheckpointError, match=message):
            write_hf(source, source.config, tmp_path / "hf")
    assert not list((tmp_path / "run").iterdir()) and not list((tmp_path / "hf").iterdir())


def test_damage_after_writing_is_found(reference, tmp_path, capsys):
    write_run(source_of(reference / SMALL), tmp_path / "run")
    chunk = next((tmp_path / "run" / "00000000" / "state" / "params" / "text" / "embed_VD").glob("[0-9]*"))
    values = bytearray(chunk.read_bytes())
    values[10] ^= 1
    chunk.write_bytes(values)
    assert inspect_checkpoint.main([str(tmp_path / "run"), "--verify"]) == 1
    assert "embed_VD/0.0 has other contents" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"embed_VD/0\.0 has other content than was written"):
        RunSource(tmp_path / "run")
    chunk.unlink()
    assert inspect_checkpoint.main([str(tmp_path / "run"), "--verify"]) == 1
    assert "embed_VD/0.0 is missing" in capsys.readouterr().out
    (tmp_path / "run" / "00000000" / checksums.FILE).write_text("x")
    assert inspect_checkpoint.main([str(tmp_path / "run"), "--verify"]) == 2
    (tmp_path / "run" / "00000000" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"00000000 is damaged \(.*_METADATA has 1 bytes.+\); give another step \(here: \[0\]\)"):
        RunSource(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "00000000" / "manifest" / "metadata").read_text())["extras"]["origin"]
