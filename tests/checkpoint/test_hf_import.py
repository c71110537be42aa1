import dataclasses
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint import hf_import
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import load_into, load_model, pieces
from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, SafetensorsFile, open_checkpoint
from interns1pro_jax.config import ConfigError, Fp8Config, ModelConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.sharding import make_mesh

LAYER = "model.language_model.layers.0."
EXPERT = LAYER + "mlp.experts.1."
PATCH_TABLE = "model.time_series.encoder_embed.pos_encoder.pe"


def weights(model):
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def stored_tensors(model):
    """The model's weights in the released layout, made with the inverse of the name table."""
    loaded, tensors = weights(model), {}
    for parameter in hf_parameters(model.config):
        ours = np.asarray(loaded[parameter.path])
        width = parameter.layout.shape[-1]
        for position, number, name in parameter.tensors():
            tensors[name] = parameter.layout.inverse().apply(ours[position][..., number * width : (number + 1) * width])
    return tensors


def read_all(directory):
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint}


@pytest.fixture
def damaged(reference, tmp_path, write_safetensors):
    """`damaged(name, change)`: a copy of a reference checkpoint after `change(tensors)`."""

    def make(name, change):
        shutil.copy(reference / name / "config.json", tmp_path)
        tensors = read_all(reference / name)
        change(tensors)
        write_safetensors(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["tiny", "tiny_bf16", "variant_shared_coef_topk", "variant_plain_rope_2per_group"])
def test_there_and_back_is_the_identity(reference, mesh, name):
    released = read_all(reference / name)
    released.pop(PATCH_TABLE, None)
    assert same_bits(stored_tensors(load_model(reference / name)), released)


def test_weights_are_where_the_model_wants_them(reference, mesh):
    released, loaded = read_all(reference / "tiny"), weights(load_model(reference / "tiny"))
    q = released[LAYER + "self_attn.q_proj.weight"]  # [heads * width, model]
    np.testing.assert_array_equal(loaded["text.runs.0.attention.q_DQH"][0, 7, 3, 5], q[3 * 32 + 5, 7])
    o = released[LAYER + "self_attn.o_proj.weight"]
    np.testing.assert_array_equal(loaded["text.runs.0.attention.o_QHD"][0, 3, 5, 7], o[7, 3 * 32 + 5])
    wi = loaded["text.runs.0.moe.wi_EDF"][0, 1]
    np.testing.assert_array_equal(wi[:, :32], released[EXPERT + "gate_proj.weight"].T)
    np.testing.assert_array_equal(wi[:, 32:], released[EXPERT + "up_proj.weight"].T)
    qkv = released["model.visual.blocks.1.attn.qkv.weight"]  # [(q, k, v) * heads * width, model]
    np.testing.assert_array_equal(loaded["vision.blocks.qkv_DCQH"][1, 9, 2, 3, 5], qkv[2 * 48 + 3 * 12 + 5, 9])
    np.testing.assert_array_equal(loaded["vision.patch_kernel_ID"], released["model.visual.patch_embed.proj.weight"].reshape(48, -1).T)
    conv = released["model.time_series.encoder.conv1.weight"]  # [out, in, tap]
    np.testing.assert_array_equal(loaded["time_series.conv1_XDE"][2, 11, 13], conv[13, 11, 2])


def test_shards_make_the_same_model_as_one_file(reference, mesh):
    single, sharded = (weights(load_model(reference / name)) for name in ("tiny_bf16", "tiny_bf16_sharded"))
    assert same_bits(single, sharded)


def test_fp8_weights_are_dequantised_exactly(reference, mesh):
    tensors = stored_tensors(load_model(reference / "tiny_fp8"))
    expected = SafetensorsFile(reference / "tiny_fp8" / "dequantized.safetensors")
    for name in expected:
        assert tensors[name].dtype == ml_dtypes.bfloat16 and tensors[name].tobytes() == expected.read(name).tobytes(), name
    for name, sums in json.loads((reference / "tiny_fp8" / "dequantized_sums.json").read_text()).items():
        values = tensors[name].astype(np.float64)
        np.testing.assert_allclose([values.sum(), np.abs(values).sum()], [sums["sum"], sums["abs_sum"]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_the_dtype_of_the_scales_does_not_matter(reference, damaged, mesh, dtype):
    def change(tensors):
        tensors.update({name: scale.astype(dtype) for name, scale in tensors.items() if name.endswith("_scale_inv")})

    assert same_bits(weights(load_model(damaged("tiny_fp8", change))), weights(load_model(reference / "tiny_fp8")))


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=4), dict(fsdp=8), dict(data=2, context=2, expert=2)])
def test_eight_devices_load_what_one_loads(reference, sizes):
    with jax.set_mesh(make_mesh()):
        single = weights(load_model(reference / "tiny"))
    with jax.set_mesh(make_mesh(**sizes)):
        config = ModelConfig.from_hf(reference / "tiny")
        abstract = nnx.state(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))))
        model = load_model(reference / "tiny")
        sharded = weights(model)
        for path, variable in nnx.to_flat_state(abstract):
            assert sharded[".".join(map(str, path))].sharding.spec == variable.get_value().sharding.spec
    assert same_bits(single, sharded)
    assert {len(array.sharding.device_set) for array in sharded.values()} == {8}


def test_fp8_shards_that_cut_blocks_equal_the_whole(reference):
    with jax.set_mesh(make_mesh()):
        single = weights(load_model(reference / "tiny_fp8"))
    with jax.set_mesh(make_mesh(fsdp=4, expert=2)):  # 256 / 8: eight devices share two blocks of 128
        assert same_bits(single, weights(load_model(reference / "tiny_fp8")))


def test_a_device_is_filled_in_small_pieces_and_every_byte_is_read_once(reference, monkeypatch):
    held, read = [], []
    whole, slices = hf_import.ParameterReader.read, Checkpoint.read

    def count_pieces(self, box):
        held.append((result := whole(self, box)).nbytes)
        return result

    def count_reads(self, name, index=None):
        read.append((result := slices(self, name, index)).nbytes)
        return result

    config, checkpoint = ModelConfig.from_hf(reference / "tiny_bf16"), open_checkpoint(reference / "tiny_bf16")
    with jax.set_mesh(make_mesh(expert=2)):
        expected = weights(load_model(reference / "tiny_bf16"))
        monkeypatch.setattr(hf_import.ParameterReader, "read", count_pieces)
        monkeypatch.setattr(Checkpoint, "read", count_reads)
        graph, state = nnx.split(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))))
        loaded = weights(nnx.merge(graph, load_into(state, checkpoint, config, host_bytes=80_000)))
    assert same_bits(loaded, expected)
    assert max(held) <= 80_000 < max(array.nbytes for array in loaded.values()) / 2
    assert max(read) <= 80_000 and sum(read) == sum(info.nbytes for info in checkpoint.values())


def test_pieces_tile_the_box():
    random = np.random.default_rng(0)
    for _ in range(30):
        shape = random.integers(1, 6, 4)
        limit = int(random.integers(4, 200))
        covered = np.zeros(shape, int)
        for piece in pieces([slice(1 if n > 1 else 0, int(n)) for n in shape], 4, limit):
            assert covered[piece].size * 4 <= limit
            covered[piece] += 1
        assert covered.max() == 1 and covered.sum() == math.prod(max(n - 1, 1) for n in shape)


def test_equal_shards_are_read_once_and_stay_apart(reference):
    with jax.set_mesh(make_mesh(data=8)):
        model = load_model(reference / "tiny_bf16")
        norm = model.text.final_norm_D[...]
        before = np.asarray(norm).copy()
        jax.jit(lambda x: x + 1, donate_argnums=0)(norm)
        again = load_model(reference / "tiny_bf16").text.final_norm_D[...]
        assert all((np.asarray(shard.data) == before).all() for shard in again.addressable_shards)


def test_parameters_are_stored_as_asked(reference, mesh):
    stored = weights(load_model(reference / "tiny"))
    model = load_model(reference / "tiny", dtype="bfloat16", param_dtype="bfloat16")
    assert model.config.text.dtype == "bfloat16" and model.text.embed_VD[...].dtype == "bfloat16"
    for path, value in weights(model).items():
        np.testing.assert_array_equal(value, np.asarray(stored[path]).astype(value.dtype))


@pytest.mark.parametrize("name", ["tiny_bf16", "tiny_fp8"])
def test_the_fused_expert_layout_is_the_same_model(reference, damaged, mesh, name):
    config = ModelConfig.from_hf(reference / name)
    experts, layers = config.text.num_experts, config.text.num_hidden_layers

    def fuse(tensors):
        for layer in range(layers):
            prefix = f"model.language_model.layers.{layer}.mlp.experts."
            for suffix in ("", "_scale_inv") if config.quantization else ("",):
                take = {k: [tensors.pop(f"{prefix}{e}.{k}_proj.weight{suffix}").T for e in range(experts)] for k in ("gate", "up", "down")}
                both = np.concatenate([np.stack(take["gate"]), np.stack(take["up"])], -1)
                tensors[f"{prefix}gate_up_proj{suffix}"] = both
                tensors[f"{prefix}down_proj{suffix}"] = np.stack(take["down"])

    def change(tensors):
        # 128 does not divide the 192 gate columns, so blocks of the fused tensor would mix gate and up: cut them into blocks of 64.
        for scale in [key for key in tensors if key.endswith("_scale_inv")]:
            rows, columns = (-(-size // 64) for size in tensors[scale.removesuffix("_scale_inv")].shape)
            tensors[scale] = tensors[scale].repeat(2, 0).repeat(2, 1)[:rows, :columns]
        fuse(tensors)

    if config.quantization:
        config = dataclasses.replace(config, quantization=Fp8Config((64, 64)))
    directory = damaged(name, change)
    assert same_bits(weights(load_model(directory, config)), weights(load_model(reference / name)))


def remove(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def replace(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def add(name, values):
    return lambda tensors: tensors.update({name: values})


@pytest.mark.parametrize(
    ("name", "change", "messages"),
    [
        ("tiny", remove("lm_head.weight", EXPERT + "up_proj.weight"), ["lm_head.weight is missing", EXPERT + "up_proj.weight is missing"]),
        ("tiny", add(LAYER + "mlp.gate.bias", np.ones(16)), [LAYER + "mlp.gate.bias is surplus"]),
        (
            "tiny",
            replace(EXPERT + "down_proj.weight", lambda w: w.T),
            [EXPERT + "down_proj.weight has shape [32, 64]", "asks for [64, 32]"],
        ),
        ("tiny", replace("lm_head.weight", lambda w: w.astype(np.int32)), ["lm_head.weight is stored as I32"]),
        (
            "tiny",
            replace("model.language_model.rotary_emb.sin_coef", lambda w: w[:, :7, :7]),
            ["rotary_emb.sin_coef has shape [2, 7, 7]", "[2, 8, 8]"],
        ),
        ("tiny", replace("lm_head.weight", lambda w: w.astype(ml_dtypes.float8_e4m3fn)), ["lm_head.weight", "no quantization_config"]),
        ("tiny", replace(PATCH_TABLE, lambda pe: pe[::-1]), [PATCH_TABLE + " is not the sinusoidal table"]),
        ("tiny", replace(PATCH_TABLE, lambda pe: pe[:, 0]), [PATCH_TABLE + " is not the sinusoidal table"]),
        (
            "tiny",
            add("model.time_series.encoder.layers.1.self_attn.k_proj.bias", np.full(64, 0.1, np.float32)),
            ["layers.1.self_attn.k_proj.bias is not zero"],
        ),
        ("tiny_fp8", remove(EXPERT + "up_proj.weight_scale_inv"), [EXPERT + "up_proj.weight_scale_inv is missing"]),
        (
            "tiny_fp8",
            replace(EXPERT + "up_proj.weight_scale_inv", lambda s: s[:1]),
            ["weight_scale_inv has shape [1, 2]", "ask for [2, 2]"],
        ),
        ("tiny_fp8", replace(EXPERT + "up_proj.weight_scale_inv", lambda s: s.astype(np.int8)), ["weight_scale_inv is stored as I8"]),
        ("tiny_fp8", replace(EXPERT + "up_proj.weight_scale_inv", lambda s: s * np.nan), ["up_proj.weight_scale_inv", "not finite"]),
        ("tiny_fp8", replace(EXPERT + "up_proj.weight_scale_inv", lambda s: -s), ["up_proj.weight_scale_inv", "negative"]),
        ("tiny_fp8", replace(EXPERT + "up_proj.weight", lambda w: w.astype(np.float32)), ["up_proj.weight_scale_inv is surplus"]),
        (
            "tiny_fp8",
            replace("model.language_model.norm.weight", lambda w: w.astype(ml_dtypes.float8_e4m3fn)),
            ["norm.weight is stored as F8_E4M3, but only matrices may be"],
        ),
    ],
)
def test_every_misfit_is_named(damaged, mesh, name, change, messages):
    directory = damaged(name, change)
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    assert str(directory) in str(error.value)
    for message in messages:
        assert message in str(error.value)


def test_many_misfits_are_one_short_error(damaged, mesh):
    def rename(tensors):
        for name in [name for name in tensors if ".mlp.experts." in name]:
            tensors[name.replace("gate_proj", "gate")] = tensors.pop(name)

    with pytest.raises(CheckpointError, match=r"\(96 problems\)") as error:
        load_model(damaged("tiny", rename))
    assert str(error.value).count("\n") == 21 and "... and 76 more" in str(error.value)


@pytest.mark.parametrize(("prefix", "key"), [("model.visual.", "vision_config"), ("model.time_series.", "ts_config")])
def test_a_tower_on_one_side_only(reference, damaged, mesh, prefix, key):
    config = ModelConfig.from_hf(reference / "tiny")
    without = dataclasses.replace(config, **{"vision" if "visual" in prefix else "time_series": None})
    with pytest.raises(CheckpointError, match=rf"tensors {prefix}\* are surplus: the config has no {key}"):
        load_model(reference / "tiny", without)
    directory = damaged("tiny", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)])
    with pytest.raises(CheckpointError, match=rf"all tensors {prefix}\* are missing, but the config has a {key}"):
        load_model(directory)
    assert getattr(load_model(directory, without), "vision" if "visual" in prefix else "time_series") is None


def test_tensors_that_only_repeat_what_the_model_knows_are_accepted(reference, damaged, mesh):
    def change(tensors):
        tensors["model.language_model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors["model.time_series.encoder.layers.0.self_attn.k_proj.bias"] = np.zeros(64, np.float32)
        tensors[PATCH_TABLE] = tensors[PATCH_TABLE].astype(ml_dtypes.bfloat16)

    assert same_bits(weights(load_model(damaged("tiny", change))), weights(load_model(reference / "tiny")))


def test_a_truncated_shard_is_named(reference, tmp_path, mesh):
    for file in (reference / "tiny_bf16_sharded").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00003-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00005.safetensors is truncated: tensor 'model\..*' ends at byte"):
        load_model(tmp_path)


def test_a_directory_without_config(tmp_path, mesh):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_model(tmp_path)


def test_a_mesh_is_needed(reference):
    with pytest.raises(ConfigError, match="no mesh is in force"):
        load_model(reference / "tiny")


def test_the_released_sizes_are_checked_and_sliced_without_memory(reference, tmp_path):
    """A sparse stand-in for six layers (58 GB) of the FP8 release: its headers fit the config, and one device's part is read."""
    config = ModelConfig.from_hf(reference / "official")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=6), quantization=Fp8Config())
    patterns = json.loads((reference / "key_patterns.json").read_text())["patterns"]
    header, end = {}, 0
    for parameter in hf_parameters(config):
        shape = parameter.layout.stored_shape
        entry = patterns[parameter.names[0].replace("blocks.{L}", "blocks.{B}")]
        stored = [("", "F8_E4M3", shape, 1), ("_scale_inv", "F32", entry["scale_shape"], 4)] if entry["fp8"] else [("", "BF16", shape, 2)]
        for *_, name in parameter.tensors():
            for suffix, dtype, dims, itemsize in stored:
                start, end = end, end + math.prod(dims) * itemsize
                header[name + suffix] = {"dtype": dtype, "shape": dims, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    checkpoint = open_checkpoint(tmp_path)
    hf_import.check_fit(checkpoint, config, hf_parameters(config))
    (wi,) = (parameter for parameter in hf_parameters(config) if parameter.path == "text.runs.0.moe.wi_EDF")
    with ThreadPoolExecutor(2) as pool:
        reader = hf_import.ParameterReader(checkpoint, wi, np.dtype(ml_dtypes.bfloat16), (128, 128), pool)
        part = reader.read([slice(5, 6), slice(448, 450), slice(64, 128), slice(0, 3072)])
    assert part.shape == (1, 2, 64, 3072) and not part.any()
