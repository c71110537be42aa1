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
    check_divides,
    check_dtypes,
    check_fields,
    check_object,
    check_positive,
    check_sizes,
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
from interns1pro_jax.tower_config import AnyVision, InternVitConfig, TimeSeriesConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class FopeConfig:
    """Fourier position encoding, spec 2.3. `None` in `TextConfig.fope` means plain rotary encoding.

    Attributes:
      init_factor: gain of the Xavier-normal initialiser of the coefficients.
      sep_head: one coefficient matrix per key/value head (True) or one for all (False).
      num_inv_freq: frequencies kept; None keeps those with a period shorter than `max_position_embeddings`.
    """

    init_factor: float = 0.5
    sep_head: bool = True
    num_inv_freq: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Training behaviour of the router that the released config does not describe (paper section on the router).

    Attributes:
      straight_through: backward through the dense softmax over all experts (spec 1.2); the forward is unchanged.
      temperature: tau of the straight-through softmax.
      balance_coef: weight of the load-balancing loss, which is 1 when balanced. The released format's `router_aux_loss_coef`
        weighs a loss that is `num_experts_per_tok` when balanced (spec 2.4), so it is smaller by that factor: 0.001 where absent.
      balance_in_group_coef: weight of the same loss within each group, from a softmax over its experts.
      balance_over: what the load-balancing losses take an expert's share of: the tokens of the `batch`, of each `microbatch` (as in the
        authors' trainer), or of each `row`, which asks for more balance. Only the first gives the same gradient however the batch
        is packed and accumulated; where it is accumulated, that costs a forward pass that counts beforehand.
      z_coef: weight of the z-loss, mean of logsumexp(logits)^2.
      z_in_group_coef: weight of the same over the logits of each group, and the mean of the groups.
    """

    straight_through: bool = True
    temperature: float = 1.0
    balance_coef: float = 1e-3
    balance_in_group_coef: float = 0.0
    balance_over: str = "batch"
    z_coef: float = 0.0
    z_in_group_coef: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.temperature > 0, f"RouterConfig.temperature={self.temperature} must be positive.")
        spans = ("batch", "microbatch", "row")
        require(self.balance_over in spans, f"RouterConfig.balance_over={self.balance_over!r} is unknown; use one of {', '.join(spans)}.")
        for name in ("balance_coef", "balance_in_group_coef", "z_coef", "z_in_group_coef"):
            require(getattr(self, name) >= 0, f"RouterConfig.{name}={getattr(self, name)} must not be negative; zero switches it off.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685), the only parameters that are trained then: W + alpha / rank * A B.

    Attributes:
      rank: columns of A, rows of B.
      attention, experts: whether the four attention projections, and the experts' three, have adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    attention: bool = True
    experts: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("LoraConfig.rank", self.rank)
        require(self.attention or self.experts, "LoraConfig.attention=False and LoraConfig.experts=False leave nothing to train.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder, spec section 2. Defaults are the released model's. Its ancestors have other sizes: no experts at all
    (`num_experts=0`), one group of them, no Fourier encoding, or an embedding that is the output head too.

    Attributes that the released config does not have:
      expert_products: `dtype`, or `fp8` for the experts' products and their gradients in e4m3 (`ops.fp8`); all else stays in `dtype`.
      lora: adapters; None for a model without.
    """

    vocab_size: int = 155008
    hidden_size: int = 4096
    num_hidden_layers: int = 94
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = 128
    attention_bias: bool = False
    num_experts: int = 512
    num_experts_per_tok: int = 8
    router_n_groups: int = 8
    moe_intermediate_size: int = 1536
    intermediate_size: int = 12288
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    fope: FopeConfig | None = FopeConfig()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    router: RouterConfig = RouterConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    expert_products: str = "dtype"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        products = ("dtype", "fp8")
        require(self.expert_products in products, f"TextConfig.expert_products={self.expert_products!r} is unknown; use one of {products}.")
        check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "decoder_sparse_step", "max_position_embeddings",
        )  # fmt: skip
        check_dtypes(self)
        check_divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary encoding turns pairs.")
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        require(not outside, f"mlp_only_layers names layers {outside}, but the model has {self.num_hidden_layers} layers.")
        if any(self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            check_sizes(self, "num_experts", "num_experts_per_tok", "router_n_groups", "moe_intermediate_size")
            check_divides("num_experts", self.num_experts, "router_n_groups", self.router_n_groups)
            check_divides("num_experts_per_tok", self.num_experts_per_tok, "router_n_groups", self.router_n_groups)
            require(
                self.experts_per_group_per_token <= self.experts_per_group,
                f"num_experts_per_tok={self.num_experts_per_tok} asks for {self.experts_per_group_per_token} experts in each of "
                f"{self.router_n_groups} groups, but a group has only {self.experts_per_group}.",
            )
        if any(not self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            check_sizes(self, "intermediate_size")
        if self.fope is not None and self.fope.num_inv_freq is not None:
            require(
                0 < self.fope.num_inv_freq <= self.head_dim // 2,
                f"num_inv_freq={self.fope.num_inv_freq} must lie in 1..head_dim/2={self.head_dim // 2}.",
            )

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts (spec 2.5)."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.router_n_groups

    @property
    def experts_per_group_per_token(self) -> int:
        return self.num_experts_per_tok // self.router_n_groups

    @property
    def layer_runs(self) -> tuple[tuple[bool, int, int], ...]:
        """Maximal runs of equal layers, as (is_moe, first layer, number of layers). Each run is one stacked module."""
        runs: list[tuple[bool, int, int]] = []
        for layer in range(self.num_hidden_layers):
            moe = self.is_moe(layer)
            if runs and runs[-1][0] == moe:
                runs[-1] = (moe, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((moe, layer, 1))
        return tuple(runs)

    @property
    def num_moe_layers(self) -> int:
        return sum(count for moe, _, count in self.layer_runs if moe)


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
