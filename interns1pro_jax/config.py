"""Configuration of Intern-S1-Pro and its ancestors, and the glossary of dimension letters.

The dataclasses are frozen and complete: every size a module needs is a field. `ModelConfig.from_hf` reads the `config.json` of any family
of `families`, `to_hf` writes it back. Names follow the released file, so that a user who knows one knows the other.

Dimension letters, used as suffixes of weights and large activations (`wi_EDF`, `x_BTD`):

    B  batch (rows)                 T  sequence (tokens of a row)      S  keys/values of a row (cache length)
    N  tokens (B*T, flattened)      D  model width                     V  vocabulary
    Q  query heads                  K  key/value heads                 H  head width
    E  experts                      G  router groups                   C  experts chosen per group (K/G of the paper)
    F  feed-forward width           M  rows of a grouped product       L  layers
    W  samples of a time-series patch (padded)                         R  rows of the patch encoder
    P  media packs: leading axis of vision and time-series inputs      I  vision patches or signal steps in a pack
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interns1pro_jax.config_checks import (
    ConfigError,
    check_fields,
    check_object,
    check_positive,
    check_type,
    field_types,
    load_json,
    reject_unknown,
    require,
    require_fixed,
)  # fmt: skip
from interns1pro_jax.families import FAMILIES, RELEASED, TEXT_FORMATS, Family, TextFormat, family_of
from interns1pro_jax.hf_config import (
    AUX_LOSS_COEF,
    FP8_FIXED,
    INTERNVIT_TOP_KEYS,
    TEXT_FIXED,
    TEXT_KEYS,
    TIME_SERIES_FIXED,
    TOP_KEYS,
    VISION_FIXED,
    read_fields,
    read_internvit,
    read_part,
    read_rope,
    write_internvit,
)  # fmt: skip
from interns1pro_jax.text_config import FopeConfig, LoraConfig, RouterConfig, TextConfig
from interns1pro_jax.tower_config import AnyVision, InternVitConfig, TimeSeriesConfig, VisionConfig

__all__ = (
    "AnyVision", "ConfigError", "FopeConfig", "Fp8Config", "InternVitConfig", "LoraConfig", "ModelConfig", "RouterConfig", "TextConfig",
    "TimeSeriesConfig", "VisionConfig",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """How an FP8 checkpoint stores its matrices (spec section 7): e4m3 values, one scale per block of the [out, in] matrix."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        require(min(self.weight_block_size) > 0, f"Fp8Config.weight_block_size={self.weight_block_size} must be positive.")

    @classmethod
    def from_hf(cls, content: Any) -> Fp8Config:
        """Reads `quantization_config`; only the released scheme (fp8, e4m3, dynamic activations, blocks) is supported."""
        where = "quantization_config"
        check_object(where, content)
        require_fixed(where, content, FP8_FIXED)
        reject_unknown(where, content, set(FP8_FIXED) | set(field_types(cls)))
        values = {"scale_fmt": None} | read_fields(where, content, cls)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        return {
            **FP8_FIXED,
            "weight_block_size": list(self.weight_block_size),
            "scale_fmt": self.scale_fmt,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model: text decoder, towers (None where absent), placeholder ids, and the family whose files describe it."""

    text: TextConfig = TextConfig()
    vision: AnyVision | None = VisionConfig()
    time_series: TimeSeriesConfig | None = TimeSeriesConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    ts_token_id: int = 151685
    ts_start_token_id: int = 151683
    ts_end_token_id: int = 151684
    quantization: Fp8Config | None = None
    family: str = RELEASED

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.family in FAMILIES, f"ModelConfig.family={self.family!r} is unknown; use one of {', '.join(FAMILIES)}.")
        family = FAMILIES[self.family]
        for name, tower, has in (("vision", self.vision, family.vision), ("time-series", self.time_series, family.time_series)):
            if tower is not None:
                require(bool(has), f"the family {self.family} has no {name} tower; set it to None, or choose another family.")
                require(
                    tower.out_hidden_size == self.text.hidden_size,
                    f"{name} out_hidden_size={tower.out_hidden_size} must equal the text hidden_size={self.text.hidden_size}.",
                )
        kind = InternVitConfig if family.tiles else VisionConfig
        require(
            self.vision is None or isinstance(self.vision, kind),
            f"the family {self.family} has a vision tower of a {kind.__name__}, not of a {type(self.vision).__name__}.",
        )
        _text_format(family, self.text)

    def with_dtypes(self, dtype: str | None = None, param_dtype: str | None = None) -> ModelConfig:
        """The same model computing in `dtype` and storing parameters in `param_dtype`; None keeps what is there."""
        change = {k: v for k, v in (("dtype", dtype), ("param_dtype", param_dtype)) if v is not None}
        towers = {
            name: dataclasses.replace(part, **change)
            for name in ("text", "vision", "time_series")
            if (part := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **towers)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads the released format: a `config.json`, a directory that holds one, or its parsed content.

        Raises:
          ConfigError: a family or a key that is unknown, a value that the family does not have, sizes that contradict each other.
        """
        if isinstance(source, Mapping):
            content, where = dict(source), "config"
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            content, where = load_json(path), str(path)
        try:
            return cls(**_read_model(content))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of the family's `config.json` for this model.

        `from_hf` of it gives this config back, but for what that format has no place for: the router's `straight_through`,
        `temperature`, `balance_over` and the coefficients but `balance_coef` come back as the defaults, and every `param_dtype` as the
        `dtype` beside it.
        `router_aux_loss_coef` is `balance_coef / num_experts_per_tok` (see `RouterConfig`).
        """
        family = FAMILIES[self.family]
        text = _write_text(self.text, _text_format(family, self.text))
        content: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "dtype": self.text.dtype,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            **{key: getattr(self, key) for key in family.media_keys},
        }
        content = {**text, **content} if family.text_key is None else {**content, family.text_key: text}
        if isinstance(self.vision, VisionConfig):
            vision = {k: v for k, v in dataclasses.asdict(self.vision).items() if k != "param_dtype"}
            content["vision_config"] = {**vision, **VISION_FIXED, "model_type": family.vision_type}
        if isinstance(self.vision, InternVitConfig):
            content |= write_internvit(self.vision, family.vision_type)
        if self.time_series is not None:
            series = {k: v for k, v in dataclasses.asdict(self.time_series).items() if k != "param_dtype"}
            content["ts_config"] = {**series, **TIME_SERIES_FIXED, "model_type": "interns1_pro_time_series"}
        if self.quantization is not None:
            content["quantization_config"] = self.quantization.to_hf()
        return content


def _read_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` in the content of a `config.json`."""
    family = family_of(content.get("model_type"), content.get("architectures"))
    if family.text_key is not None:
        parts = {family.text_key, "vision_config", "ts_config", "quantization_config"}
        reject_unknown("top level", content, TOP_KEYS | set(family.media_keys) | parts | (INTERNVIT_TOP_KEYS if family.tiles else set()))
        require(family.text_key in content, f"{family.text_key} is missing.")
    default = content.get("dtype") or content.get("torch_dtype")
    tied = content.get("tie_word_embeddings")
    if tied is not None:
        check_type("tie_word_embeddings", tied, bool)
    text = _read_text(content, family, default, family.tied if tied is None else tied)
    model: dict[str, Any] = {"text": text, "vision": None, "time_series": None, "family": family.model_type}
    if family.vision and content.get("vision_config") is not None:
        dtype = default or text.dtype
        if family.tiles:
            model["vision"] = InternVitConfig(**read_internvit(content, InternVitConfig, dtype), out_hidden_size=text.hidden_size)
        else:
            model["vision"] = VisionConfig(**read_part("vision_config", content["vision_config"], VisionConfig, VISION_FIXED, dtype))
    if family.time_series and content.get("ts_config") is not None:
        series = read_part("ts_config", content["ts_config"], TimeSeriesConfig, TIME_SERIES_FIXED, default or text.dtype)
        model["time_series"] = TimeSeriesConfig(**series)
    for key in family.media_keys:
        if content.get(key) is not None:
            check_type(key, content[key], int)
            model[key] = content[key]
    if content.get("quantization_config") is not None:
        model["quantization"] = Fp8Config.from_hf(content["quantization_config"])
    return model


def _read_text(whole: Mapping[str, Any], family: Family, dtype: str | None, tied: bool) -> TextConfig:
    where = family.text_key or "top level"
    content = whole if family.text_key is None else whole[family.text_key]
    check_object(where, content)
    format = TEXT_FORMATS[family.texts[0]]
    if len(family.texts) > 1:
        kind = content.get("model_type")
        require(kind in family.texts, f"{where}.model_type={kind!r} is no decoder of this family; it has {' and '.join(family.texts)}.")
        format = TEXT_FORMATS[str(kind)]
    content = dict(content)
    if content.get("num_local_experts") is not None:  # what later versions of the library call it
        content["num_experts"] = content.pop("num_local_experts")
    beside = TOP_KEYS | {"quantization_config"} if family.text_key is None else set()
    values = read_part(where, content, TextConfig, TEXT_FIXED | dict(format.fixed), dtype, {*TEXT_KEYS, *format.ignored, *beside})
    kinds = set(content.get("layer_types") or ())
    require(kinds <= {"full_attention"}, f"{where}.layer_types={sorted(kinds)} is not supported; only full_attention is.")
    values = dict(format.defaults) | {key: value for key, value in values.items() if key not in format.absent}
    values["tie_word_embeddings"] = tied
    heads = values.setdefault("num_attention_heads", TextConfig.num_attention_heads)
    check_positive(f"{where}.num_attention_heads", heads)
    if "num_key_value_heads" in content or "num_key_value_heads" not in values:
        values["num_key_value_heads"] = content.get("num_key_value_heads") or heads
    values.setdefault("head_dim", values.get("hidden_size", TextConfig.hidden_size) // heads)
    values["router_n_groups"] = max(values.get("router_n_groups", 1), 1)
    scaling = content.get("rope_scaling") or content.get("rope_parameters") or {}
    check_object(f"{where}.rope_scaling", scaling)
    fope, theta = read_rope(f"{where}.rope_scaling", {k: v for k, v in scaling.items() if k not in format.ignored})
    require(fope is None or format.has_fope, f"{where}.rope_scaling: the family {family.model_type} has no Fourier encoding.")
    values["fope"] = None if fope is None else FopeConfig(**fope)
    if theta is not None and content.get("rope_theta") is None:
        values["rope_theta"] = theta
    coef = AUX_LOSS_COEF if content.get("router_aux_loss_coef") is None else content["router_aux_loss_coef"]
    check_type(f"{where}.router_aux_loss_coef", coef, float)
    experts = values.get("num_experts_per_tok", TextConfig.num_experts_per_tok)
    # Twelve digits, so that the division that wrote the coefficient is undone exactly.
    values["router"] = RouterConfig(balance_coef=float(f"{coef * max(experts, 1):.12g}"))
    return TextConfig(**values)


def _text_format(family: Family, text: TextConfig) -> TextFormat:
    """The format among the family's that can describe this decoder.

    Raises:
      ConfigError: there is none, as the decoder has what the family has not; the first such field is named.
    """
    problem = ""
    for name in family.texts:
        format = TEXT_FORMATS[name]
        values = {field.name: field.default for field in dataclasses.fields(TextConfig)} | dict(format.defaults)
        differing = [key for key in format.absent if getattr(text, key) != values[key]]
        if text.fope is not None and not format.has_fope:
            differing.append("fope")
        if not differing:
            return format
        problem = f"{differing[0]}={getattr(text, differing[0])!r}"
    raise ConfigError(f"the family {family.model_type} has no decoders with {problem}; change it, or choose another family.")


def _write_text(config: TextConfig, format: TextFormat) -> dict[str, Any]:
    omitted = {"fope", "router", "lora", "expert_products", "param_dtype", *format.absent}
    text = {k: v for k, v in dataclasses.asdict(config).items() if k not in omitted}
    if "mlp_only_layers" in text:
        text["mlp_only_layers"] = list(config.mlp_only_layers)
    text["rope_scaling"] = {"rope_type": "default"} if format.has_fope else None
    if config.fope is not None:
        for key in ("init_factor", "sep_head"):
            text["rope_scaling"][f"fope_{key}"] = getattr(config.fope, key)
        text["rope_scaling"]["num_inv_freq"] = config.fope.num_inv_freq
    if config.num_experts:
        text["router_aux_loss_coef"] = config.router.balance_coef / max(config.num_experts_per_tok, 1)
    return {**text, **TEXT_FIXED, **format.fixed, "model_type": format.model_type}
