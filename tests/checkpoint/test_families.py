"""Every family of released models: in, out, and through the blocks, as the transformers library has it.

The library is no dependency of the tests: `pip install '.[parity]'` brings it, and the comparisons with it run then.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.config import ConfigError, ModelConfig, TextConfig
from interns1pro_jax.families import FAMILIES
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.models.vision_inputs import VisionItem, pack_vision
from interns1pro_jax.ops.losses import cross_entropy
from interns1pro_jax.sharding import make_mesh
from tests.tiny import random_inputs

SIZES = dict(
    vocab_size=96, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128, rope_theta=1e4,
)  # fmt: skip
TOWER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[28, 28], patch_size=[7, 7])
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
TEXTS = {
    "qwen3": dict(SIZES, tie_word_embeddings=True),
    "qwen3_moe": dict(SIZES, **EXPERTS, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1]),
}
TOWERS = {
    "interns1": dict(norm_type="layer_norm", attention_bias=True),  # as Intern-S1-mini
    "internvl": dict(norm_type="rms_norm", use_qk_norm=True),  # as Intern-S1
}
INPUTS = random_inputs(rows=2)


def config_of(family: str) -> ModelConfig:
    """A tiny model of the family, as its config.json says it."""
    head = {"model_type": family, "architectures": [FAMILIES[family].architecture], "dtype": "float32"}
    if family not in TOWERS:
        return ModelConfig.from_hf({**head, **TEXTS[family], "initializer_range": 0.3})
    text = "qwen3" if family == "interns1" else "qwen3_moe"
    return ModelConfig.from_hf(
        {
            **head,
            "image_token_id": 90,
            "tie_word_embeddings": False,
            "text_config": {**TEXTS[text], "model_type": text, "initializer_range": 0.3},
            "vision_config": {**TOWER, **TOWERS[family], "initializer_range": 0.2},
        }
    )


def tile_patches(pixels):
    """Patches of a tile [3, 28, 28] in merge order."""
    return pixels.reshape(3, 2, 2, 7, 2, 2, 7).transpose(1, 4, 2, 5, 0, 3, 6).reshape(16, -1)


def image_inputs(config):
    """Two rows with an image of one tile and one of two, each in a pack of its own; and the tiles' pixels."""
    pixels = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
    tokens = np.minimum(np.asarray(INPUTS.tokens), 89)
    tokens[0, 2:6] = tokens[1, 1:9] = config.image_token_id
    one, two, three = map(tile_patches, pixels)
    packs = [[VisionItem(one, (1, 4, 4))], [VisionItem(np.concatenate([two, three]), (2, 4, 4))]]
    return dataclasses.replace(INPUTS, tokens=tokens, vision=pack_vision(packs, config.vision)), pixels


def content(directory):
    checkpoint = open_checkpoint(directory)
    return {name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.items()}


def weights(model):
    return {path: np.asarray(v.get_value()).tobytes() for path, v in nnx.to_flat_state(nnx.state(model))}


def logits(model, inputs=INPUTS):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graph, state)
        return model.text.logits(model(inputs).hidden_BTD)

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(state))


@pytest.mark.parametrize("family", [*TEXTS, *TOWERS])
def test_a_model_of_a_family_comes_back(family, tmp_path):
    with jax.set_mesh(make_mesh(fsdp=8)):
        model = create_model(config_of(family))
        export_model(model, model.config, tmp_path)
        again = load_model(tmp_path)
    assert again.config == model.config and weights(again) == weights(model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    names = set(open_checkpoint(tmp_path))
    assert (FAMILIES[family].head + "weight" in names) != model.config.text.tie_word_embeddings
    assert FAMILIES[family].text + "layers.1.mlp.gate_proj.weight" in names


def test_a_tied_embedding_has_the_gradient_of_both_its_uses(mesh):
    config = config_of("qwen3")
    tied = create_model(dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1)))
    own = create_model(dataclasses.replace(tied.config, text=dataclasses.replace(tied.config.text, tie_word_embeddings=False)))
    nnx.update(own, nnx.state(tied))
    own.text.lm_head_DV[...] = tied.text.embed_VD[...].T

    def gradient(model):
        graph, state = nnx.split(model)
        labels = jnp.roll(INPUTS.tokens, -1, 1)

        def loss(state):
            model = nnx.merge(graph, state)
            return cross_entropy(model(INPUTS).hidden_BTD, model.text.head_DV, labels)[0]

        return jax.jit(jax.grad(loss))(state)["text"]

    one, two = gradient(tied), gradient(own)
    both = two["embed_VD"][...] + two["lm_head_DV"][...].T
    assert np.abs(two["lm_head_DV"][...]).max() > 1
    np.testing.assert_allclose(one["embed_VD"][...], both, rtol=1e-4, atol=1e-4)


def test_four_devices_train_what_one_trains():
    """Experts of one group and InternViT, over devices that share weights and rows."""

    def gradient(**sizes):
        with jax.set_mesh(make_mesh(**sizes)), jax.default_matmul_precision("highest"):
            model = create_model(config_of("internvl"))
            inputs, _ = image_inputs(model.config)
            graph, state = nnx.split(model)

            def loss(state):
                model = nnx.merge(graph, state)
                return cross_entropy(model(inputs).hidden_BTD, model.text.head_DV, jnp.roll(jnp.asarray(inputs.tokens), -1, 1))[0]

            found = jax.jit(jax.grad(loss))(state)
            return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(found)}

    one, four = gradient(), gradient(fsdp=2, context=2)
    for path, expected in one.items():
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(four[path], expected, atol=1e-4 * np.abs(expected).max(), err_msg=str(path))


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(tmp_path, mesh, write_safetensors):
    model = create_model(config_of("qwen3"))
    export_model(model, model.config, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    again = load_model(tmp_path)
    assert weights(again) == weights(model)
    export_model(again, again.config, tmp_path / "out", like=open_checkpoint(tmp_path))
    assert content(tmp_path / "out") == {name: value for name, value in content(tmp_path).items() if name != "lm_head.weight"}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding, but .* tie_word_embeddings=true"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", dict(router_n_groups=1, fope=None), "the family qwen3 has no decoders with num_experts=512"),
        ("qwen3_moe", {}, "the family qwen3_moe has no decoders with router_n_groups=8"),
        ("qwen3_moe", dict(router_n_groups=1), "has no decoders with fope="),
        ("qwen4", {}, r"family='qwen4' is unknown; use one of interns1_pro, .*qwen3_moe"),
    ],
)
def test_a_family_has_only_what_its_files_can_say(family, changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(text=TextConfig(**changes), vision=None, time_series=None, family=family)


# The same, by the library itself.


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("torch", reason="comparisons with the transformers library need `pip install '.[parity]'`")
    return pytest.importorskip("transformers", reason="comparisons with the transformers library need `pip install '.[parity]'`")


def official(library, family):
    """A tiny model of the library with weights that are nowhere trivial."""
    import torch

    torch.manual_seed(0)
    if family == "qwen3_vl_moe":
        rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        tower = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=40, patch_size=4)
        config = library.Qwen3VLMoeConfig(
            text_config=dict(SIZES, **EXPERTS, rope_scaling=rope),
            vision_config=dict(tower, deepstack_visual_indexes=[0], num_position_embeddings=16),
        )
    elif family == "internvl":
        config = library.InternVLConfig(
            text_config=dict(TEXTS["qwen3_moe"], model_type="qwen3_moe"),
            vision_config=dict(TOWER, **TOWERS[family]),
            image_token_id=90,
            tie_word_embeddings=False,
        )
    else:
        config = library.AutoConfig.for_model(family, **TEXTS[family])
    model = getattr(library, FAMILIES[family].architecture)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.2 * torch.randn_like(weight) + ("norm" in name and name.endswith("weight")))
    return model


def official_logits(model, inputs, pixels):
    import torch

    media = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)}
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(inputs.tokens)).long(), **media).logits.numpy()


@pytest.mark.parametrize("family", [*TEXTS, "qwen3_vl_moe", "internvl"])
def test_the_library_agrees(library, family, tmp_path, mesh):
    theirs = official(library, family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.family == family
    inputs, pixels = image_inputs(ours.config) if ours.config.vision else (INPUTS, None)
    expected = official_logits(theirs, inputs, pixels)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(ours, inputs), expected, atol=1e-4)
    export_model(ours, ours.config, tmp_path / "ours", like=open_checkpoint(tmp_path / "theirs"))
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    again = official_logits(type(theirs).from_pretrained(tmp_path / "ours"), inputs, pixels)
    np.testing.assert_allclose(again, expected, atol=1e-5)  # the library's own sums are not always in one order
