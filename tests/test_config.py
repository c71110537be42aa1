"""The released config.json in and out, and the errors of impossible configurations."""

import dataclasses
import json

import pytest

from interns1pro_jax.config import ConfigError, FopeConfig, ModelConfig, TextConfig
from interns1pro_jax.ops.fope import text_frequencies


def test_defaults_are_the_released_model(reference):
    released = ModelConfig.from_hf(reference / "official")
    assert released.text == dataclasses.replace(ModelConfig().text, router=released.text.router)
    assert released.vision == ModelConfig().vision
    assert len(text_frequencies(released.text)) == 45
    assert released.text.layer_runs == ((True, 0, 94),)
    assert released.quantization is not None and len(released.quantization.modules_to_not_convert) == 623


def test_round_trip_through_the_released_format(reference):
    for path in sorted(reference.glob("*/config.json")):
        config = ModelConfig.from_hf(path)
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config, path
    changed = ModelConfig(text=TextConfig(fope=None, mlp_only_layers=(3, 5), attention_bias=True), time_series=None)
    assert ModelConfig.from_hf(changed.to_hf()) == changed


def test_auxiliary_loss_coefficient_is_converted():
    """The released format weighs a loss that is num_experts_per_tok when balanced; ours is 1."""
    for experts in (1, 3, 7, 11):
        text = {"num_experts": 77 * experts, "num_experts_per_tok": experts, "router_n_groups": 1}
        config = ModelConfig.from_hf({"text_config": {**text, "router_aux_loss_coef": 0.0123}})
        assert config.text.router.balance_coef == pytest.approx(0.0123 * experts)
        assert config.to_hf()["text_config"]["router_aux_loss_coef"] == pytest.approx(0.0123)
        assert ModelConfig.from_hf(config.to_hf()) == config
        assert ModelConfig.from_hf({"text_config": text}).text.router.balance_coef == pytest.approx(0.001 * experts)


def test_an_empty_text_config_is_the_default_with_derived_widths():
    text = ModelConfig.from_hf({"text_config": {}}).text
    assert (text.num_key_value_heads, text.head_dim, text.router_n_groups, text.fope) == (64, 64, 1, None)
    assert text.vocab_size == TextConfig.vocab_size
    nulls = dict.fromkeys(("head_dim", "num_key_value_heads", "mlp_only_layers", "router_n_groups", "rope_scaling"))
    assert ModelConfig.from_hf({"text_config": nulls}).text == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_attention_heads=0), "text_config.num_attention_heads=0 must be a positive integer"),
        (dict(router_n_groups="x"), "text_config.router_n_groups='x' must be an integer, not str"),
        (dict(rope_scaling="x"), "text_config.rope_scaling='x' must be a JSON object"),
        (dict(mlp_only_layers="12"), "text_config.mlp_only_layers='12' must be a list, each an integer"),
        (dict(mlp_only_layers=[1.5]), "text_config.mlp_only_layers=.* must be a list, each an integer"),
        (dict(rms_norm_eps="x"), "text_config.rms_norm_eps='x' must be a number"),
        (dict(hidden_size=64.0), r"text_config.hidden_size=64\.0 must be an integer, not float"),
        (dict(num_experts=True), "text_config.num_experts=True must be an integer"),
        (dict(attention_bias=1), "text_config.attention_bias=1 must be true or false"),
        (dict(router_aux_loss_coef="x"), "text_config.router_aux_loss_coef='x' must be a number"),
        (dict(router_aux_loss_coef=-1), r"RouterConfig.balance_coef=-8\.0 must not be negative"),
        (dict(rope_scaling={"num_inv_freq": "x"}), "rope_scaling.num_inv_freq='x' must be an integer"),
        (dict(dtype=5), "TextConfig.dtype=5 must be a string"),
    ],
)
def test_values_of_wrong_types_are_named(changes, message):
    with pytest.raises(ConfigError, match="^config: .*" + message):
        ModelConfig.from_hf({"text_config": changes})


def test_layer_runs_follow_dense_layers():
    config = TextConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert [config.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config.layer_runs == ((False, 0, 1), (True, 1, 1), (False, 2, 3), (True, 5, 1))
    assert config.num_moe_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts=500), "num_experts=500 must be divisible by router_n_groups=8"),
        (dict(num_experts_per_tok=12), "num_experts_per_tok=12 must be divisible by router_n_groups=8"),
        (dict(num_experts=8, num_experts_per_tok=16), "a group has only 1"),
        (dict(num_attention_heads=6), "num_attention_heads=6 must be divisible by num_key_value_heads=4"),
        (dict(mlp_only_layers=(94,)), r"mlp_only_layers names layers \[94\]"),
        (dict(dtype="float16"), "dtype='float16' is not supported"),
        (dict(head_dim=127), "head_dim=127 must be even"),
        (dict(rms_norm_eps="x"), "TextConfig.rms_norm_eps='x' must be a number"),
        (dict(hidden_size=0), "hidden_size=0 must be a positive integer"),
        (dict(fope=FopeConfig(num_inv_freq=65)), r"num_inv_freq=65 must lie in 1\.\.head_dim/2=64"),
    ],
)
def test_impossible_text_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(surprise=1), r"unknown keys \['surprise'\]"),
        (lambda c: c["text_config"].update(num_expert=4), r"text_config: unknown keys \['num_expert'\]"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "hidden_act='relu' is not supported"),
        (lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn"), "rope_type='yarn' is not supported"),
        (lambda c: c["vision_config"].update(out_hidden_size=5), "vision out_hidden_size=5 must equal the text hidden_size"),
        (lambda c: c.update(tie_word_embeddings="x"), "tie_word_embeddings='x' must be true or false"),
        (lambda c: c.update(model_type="llama"), r"model_type='llama' is no family .* interns1_pro \(.*qwen3_moe \(Qwen3MoeForCausalLM"),
        (lambda c: c.update(model_type=["x"]), r"model_type=\['x'\] is no family"),
        (lambda c: c.update(architectures=["X"]), r"architectures=\['X'\] does not belong to model_type='interns1_pro'"),
        (lambda c: c.pop("text_config"), "text_config is missing"),
        (lambda c: c.update(ts_token_id="x"), "ts_token_id='x' must be an integer"),
        (lambda c: c.update(vision_config=[]), r"vision_config=\[\] must be a JSON object"),
        (lambda c: c["ts_config"].update(d_model="x"), "ts_config.d_model='x' must be an integer"),
        (lambda c: c.update(quantization_config="fp8"), "quantization_config='fp8' must be a JSON object"),
        (lambda c: c["quantization_config"].update(weight_block_size=[128]), "weight_block_size=.* must be a list of 2, each an integer"),
        (lambda c: c["quantization_config"].update(weight_block_size=[0, 128]), "weight_block_size=.* must be positive"),
        (lambda c: c["quantization_config"].update(fmt="e5m2"), "fmt='e5m2' is not supported"),
    ],
)
def test_wrong_files_are_named(edit, message):
    from interns1pro_jax.config import Fp8Config

    content = dataclasses.replace(ModelConfig(), quantization=Fp8Config()).to_hf()
    edit(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(content)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ModelConfig.from_hf(tmp_path)
