"""The released `config.json`: its keys, and the reading of its parts into the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from interns1pro_jax.config_checks import check_object, check_type, field_types, is_of_type, reject_unknown, require, require_fixed

# Keys of the released files with one supported value: the architecture has no other.
FP8_FIXED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
TEXT_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}
TIME_SERIES_FIXED = {
    "activation_function": "gelu", "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    "encoder_layerdrop": 0.0, "scale_embedding": False,
}  # fmt: skip
# Keys of InternViT: what they are called beside our names, and those with one supported value.
_INTERNVIT_NAMES = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_channels": "num_channels"}
_INTERNVIT_FIXED = {
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "projection_dropout": 0.0, "use_mask_token": False,
    "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip
_INTERNVIT_TOP_FIXED = {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
_INTERNVIT_DEFAULTS = {
    "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "use_qk_norm": False, "norm_type": "layer_norm",
}  # fmt: skip
# Of training only, or told by other files; and what stands elsewhere in `config.json` or in the preprocessor's.
_INTERNVIT_IGNORED = ("drop_path_rate", "dropout", "initializer_factor")
_INTERNVIT_ELSEWHERE = ("spatial_merge_size", "out_hidden_size", "min_tiles", "max_tiles", "image_mean", "image_std", "param_dtype")
INTERNVIT_TOP_KEYS = {"downsample_ratio", "image_seq_length", *_INTERNVIT_TOP_FIXED}
AUX_LOSS_COEF = 1e-3  # where a released config has no router_aux_loss_coef
# Keys without effect on the model's numbers.
COMMON_KEYS = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "output_router_logits",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "_name_or_path", "_attn_implementation",
    "attn_implementation", "initializer_range", "return_dict", "output_hidden_states", "output_attentions", "auto_map",
}  # fmt: skip
TOP_KEYS = COMMON_KEYS | {"vocab_size", "hidden_size", "name_or_path"}
TEXT_KEYS = {"rope_scaling", "rope_parameters", "router_aux_loss_coef", "layer_types"}


def read_fields(where: str, content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields of dataclass `kind` in `content`, of the right types. Where null is no value of a field, it means absent."""
    values: dict[str, Any] = {}
    for name, hint in field_types(kind).items():
        value = content.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if name in content and (value is not None or is_of_type(None, hint)):
            check_type(f"{where}.{name}", value, hint)
            values[name] = value
    return values


def read_part(
    where: str, content: Any, kind: type, fixed: Mapping[str, Any], dtype: str | None, others: Collection[str] = ()
) -> dict[str, Any]:
    """`read_fields` of the text decoder or of a tower, after checking that nothing else there matters but the keys `others`."""
    check_object(where, content)
    fields = set(field_types(kind)) - {"dtype", "param_dtype", "fope", "router"}
    reject_unknown(where, content, fields | set(fixed) | COMMON_KEYS | set(others))
    require_fixed(where, content, fixed)
    stored = content.get("dtype") or content.get("torch_dtype") or dtype or "bfloat16"
    return read_fields(where, {k: v for k, v in content.items() if k in fields}, kind) | {"dtype": stored, "param_dtype": stored}


def read_rope(where: str, scaling: Mapping[str, Any]) -> tuple[dict[str, Any] | None, float | None]:
    """The fields of `FopeConfig`, which is on iff any of its keys is set (spec 2.3), and theta if it stands here."""
    keys = {"fope_init_factor": float, "fope_sep_head": bool, "num_inv_freq": int, "fope_num_inv_freq": int}
    reject_unknown(where, scaling, {*keys, "rope_type", "type", "rope_theta"})
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    require(rope_type == "default", f"{where}.rope_type={rope_type!r} is not supported; only 'default' is.")
    present = {key: scaling[key] for key in (*keys, "rope_theta") if scaling.get(key) is not None}
    for key, value in present.items():
        check_type(f"{where}.{key}", value, keys.get(key, float))
    theta = present.pop("rope_theta", None)
    if not present:
        return None, theta
    count = present.get("num_inv_freq", present.get("fope_num_inv_freq"))
    fope = {"sep_head": present.get("fope_sep_head", False), "num_inv_freq": count}
    if "fope_init_factor" in present:
        fope["init_factor"] = present["fope_init_factor"]
    return fope, theta


def read_internvit(content: Mapping[str, Any], kind: type, dtype: str | None) -> dict[str, Any]:
    """The fields of `InternVitConfig` in the content of a whole `config.json`, but for the width of the text."""
    where = "vision_config"
    check_object(where, content[where])
    require_fixed("top level", content, _INTERNVIT_TOP_FIXED)
    vision = dict(content[where])
    for ours, theirs in _INTERNVIT_NAMES.items():
        if theirs in vision:
            vision[ours] = vision.pop(theirs)
    for key in ("image_size", "patch_size"):
        sides = vision.get(key)
        if isinstance(sides, list | tuple):
            require(len(set(sides)) == 1, f"{where}.{key}={sides!r} is not supported; only squares are.")
            vision[key] = sides[0]
    ratio = content.get("downsample_ratio", 0.5)
    check_type("downsample_ratio", ratio, float)
    require(ratio > 0 and (1 / ratio).is_integer(), f"downsample_ratio={ratio!r} is not supported; only 1/2, 1/3, ... are.")
    values = _INTERNVIT_DEFAULTS | read_part(where, vision, kind, _INTERNVIT_FIXED, dtype, _INTERNVIT_IGNORED)
    values.pop("out_hidden_size", None)
    return values | {"spatial_merge_size": int(1 / ratio)}


def write_internvit(config: Any, model_type: str) -> dict[str, Any]:
    """The part of a `config.json` that describes an `InternVitConfig`."""
    values = {
        _INTERNVIT_NAMES.get(name, name): getattr(config, name) for name in field_types(type(config)) if name not in _INTERNVIT_ELSEWHERE
    }
    square = {key: [values[key]] * 2 for key in ("image_size", "patch_size")}
    return {
        "vision_config": {**values, **square, **_INTERNVIT_FIXED, "model_type": model_type},
        "downsample_ratio": 1 / config.spatial_merge_size,
        "image_seq_length": config.num_position_embeddings // config.spatial_merge_size**2,
        **_INTERNVIT_TOP_FIXED,
    }
