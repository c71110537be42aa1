"""Configuration of the Intern-S1-Pro family, and the glossary of dimension letters.

The dataclasses are frozen and complete: every size a module needs is a field. `ModelConfig.from_hf` reads the released
`config.json`, `to_hf` writes it back. Names follow the released file, so that a user who knows one knows the other.

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
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interns1pro_jax.config_checks import (
    ConfigError,
    check_divides,
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
from interns1pro_jax.hf_config import (
    AUX_LOSS_COEF,
    FP8_FIXED,
    TEXT_FIXED,
    TIME_SERIES_FIXED,
    TOKEN_ID_KEYS,
    TOP_KEYS,
    VISION_FIXED,
    read_fields,
    read_part,
    read_rope,
)  # fmt: skip

_DTYPES = ("float32", "bfloat16")


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        check_positive(f"{type(config).__name__}.{name}", getattr(config, name))


def _check_dtypes(config: Any) -> None:
    for name in ("dtype", "param_dtype"):
        value = getattr(config, name)
        require(value in _DTYPES, f"{type(config).__name__}.{name}={value!r} is not supported; use one of {', '.join(_DTYPES)}.")


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
      balance_over: what the load-balancing loss takes an expert's share of: the tokens of the `batch` (of each microbatch where
        gradients are accumulated, as in the authors' trainer), or of each `row`, which asks for more balance, but gives the same
        gradient however the batch is split.
      z_coef: weight of the z-loss, mean of logsumexp(logits)^2.
    """

    straight_through: bool = True
    temperature: float = 1.0
    balance_coef: float = 1e-3
    balance_over: str = "batch"
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.temperature > 0, f"RouterConfig.temperature={self.temperature} must be positive.")
        require(self.balance_over in ("batch", "row"), f"RouterConfig.balance_over={self.balance_over!r} is unknown; use batch or row.")
        for name in ("balance_coef", "z_coef"):
            require(getattr(self, name) >= 0, f"RouterConfig.{name}={getattr(self, name)} must not be negative; zero switches it off.")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder, spec section 2. Defaults are the released model's."""

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
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    router: RouterConfig = RouterConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "decoder_sparse_step", "max_position_embeddings",
        )  # fmt: skip
        _check_dtypes(self)
        check_divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary encoding turns pairs.")
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        require(not outside, f"mlp_only_layers names layers {outside}, but the model has {self.num_hidden_layers} layers.")
        if any(self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            _check_sizes(self, "num_experts", "num_experts_per_tok", "router_n_groups", "moe_intermediate_size")
            check_divides("num_experts", self.num_experts, "router_n_groups", self.router_n_groups)
            check_divides("num_experts_per_tok", self.num_experts_per_tok, "router_n_groups", self.router_n_groups)
            require(
                self.experts_per_group_per_token <= self.experts_per_group,
                f"num_experts_per_tok={self.num_experts_per_tok} asks for {self.experts_per_group_per_token} experts in each of "
                f"{self.router_n_groups} groups, but a group has only {self.experts_per_group}.",
            )
        if any(not self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            _check_sizes(self, "intermediate_size")
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
class VisionConfig:
    """The native-resolution vision tower, spec section 3. Defaults are the released model's."""

    depth: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 2304
    out_hidden_size: int = 4096
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_sizes(
            self, "depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
            "spatial_merge_size", "in_channels", "num_position_embeddings", "out_hidden_size",
        )  # fmt: skip
        _check_dtypes(self)
        check_divides("vision hidden_size", self.hidden_size, "num_heads", self.num_heads)
        require(
            self.head_dim % 4 == 0,
            f"vision hidden_size/num_heads={self.head_dim} must be divisible by 4: its rotary encoding turns row and column pairs.",
        )
        side = math.isqrt(self.num_position_embeddings)
        require(side * side == self.num_position_embeddings, f"num_position_embeddings={self.num_position_embeddings} must be a square.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch, in the order (channel, frame, y, x)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class TimeSeriesConfig:
    """The time-series tower, spec section 4. Defaults are the sizes of the authors' trainer."""

    d_model: int = 768
    encoder_layers: int = 17
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 3072
    max_source_positions: int = 1500
    num_mel_bins: int = 80
    ts_adapt_in_dim: int = 256
    ts_adapt_out_dim: int = 1024
    ts_hidden_dim: int = 1024
    out_hidden_size: int = 4096
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    # Sizes that the released architecture fixes in code rather than in its config (spec 1).
    PATCH_WIDTH = 128
    PATCH_HEADS = 8
    PATCH_FFN = 2048
    MAX_PATCH = 320

    def __post_init__(self) -> None:
        check_fields(self)
        _check_sizes(
            self, "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions",
            "num_mel_bins", "ts_adapt_in_dim", "ts_adapt_out_dim", "ts_hidden_dim", "out_hidden_size",
        )  # fmt: skip
        _check_dtypes(self)
        check_divides("time-series d_model", self.d_model, "encoder_attention_heads", self.encoder_attention_heads)
        require(
            self.ts_adapt_in_dim == 2 * self.PATCH_WIDTH,
            f"ts_adapt_in_dim={self.ts_adapt_in_dim} must be {2 * self.PATCH_WIDTH}: two patch encodings are concatenated.",
        )
        require(
            self.ts_hidden_dim == self.ts_adapt_out_dim,
            f"ts_hidden_dim={self.ts_hidden_dim} must equal ts_adapt_out_dim={self.ts_adapt_out_dim}: the encoder feeds the projector.",
        )


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
    """The whole model: text decoder, towers (None where absent) and placeholder ids."""

    text: TextConfig = TextConfig()
    vision: VisionConfig | None = VisionConfig()
    time_series: TimeSeriesConfig | None = TimeSeriesConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    ts_token_id: int = 151685
    ts_start_token_id: int = 151683
    ts_end_token_id: int = 151684
    quantization: Fp8Config | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, tower in (("vision", self.vision), ("time-series", self.time_series)):
            if tower is not None:
                require(
                    tower.out_hidden_size == self.text.hidden_size,
                    f"{name} out_hidden_size={tower.out_hidden_size} must equal the text hidden_size={self.text.hidden_size}.",
                )

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
          ConfigError: a key that is unknown, a value this family does not have, sizes that contradict each other.
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
        """The content of the released `config.json` for this model.

        `from_hf` of it gives this config back, but for what that format has no place for: the router's `straight_through`,
        `temperature` and `z_coef` come back as the defaults, and every `param_dtype` as the `dtype` beside it.
        `router_aux_loss_coef` is `balance_coef / num_experts_per_tok` (see `RouterConfig`).
        """
        text = {k: v for k, v in dataclasses.asdict(self.text).items() if k not in ("fope", "router", "param_dtype")}
        text["mlp_only_layers"] = list(self.text.mlp_only_layers)
        text["rope_scaling"] = {"rope_type": "default"}
        if self.text.fope is not None:
            for key in ("init_factor", "sep_head"):
                text["rope_scaling"][f"fope_{key}"] = getattr(self.text.fope, key)
            text["rope_scaling"]["num_inv_freq"] = self.text.fope.num_inv_freq
        text["router_aux_loss_coef"] = self.text.router.balance_coef / max(self.text.num_experts_per_tok, 1)
        text.update(TEXT_FIXED, model_type="interns1_pro_text")
        content: dict[str, Any] = {
            "architectures": ["InternS1ProForConditionalGeneration"],
            "model_type": "interns1_pro",
            "dtype": self.text.dtype,
            "tie_word_embeddings": False,
            "text_config": text,
            **{key: getattr(self, key) for key in TOKEN_ID_KEYS},
        }
        if self.vision is not None:
            vision = {k: v for k, v in dataclasses.asdict(self.vision).items() if k != "param_dtype"}
            content["vision_config"] = {**vision, **VISION_FIXED, "model_type": "interns1_pro_vision"}
        if self.time_series is not None:
            series = {k: v for k, v in dataclasses.asdict(self.time_series).items() if k != "param_dtype"}
            content["ts_config"] = {**series, **TIME_SERIES_FIXED, "model_type": "interns1_pro_time_series"}
        if self.quantization is not None:
            content["quantization_config"] = self.quantization.to_hf()
        return content


def _read_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` in the content of a `config.json`."""
    require(not content.get("tie_word_embeddings"), "tie_word_embeddings=true is not supported; this family has a separate lm_head.")
    parts = {"text_config", "vision_config", "ts_config", "quantization_config"}
    reject_unknown("top level", content, TOP_KEYS | parts)
    require("text_config" in content, "text_config is missing.")
    default = content.get("dtype") or content.get("torch_dtype")
    text = _read_text(content["text_config"], default)
    model: dict[str, Any] = {"text": text, "vision": None, "time_series": None}
    for name, key, kind, fixed in (
        ("vision", "vision_config", VisionConfig, VISION_FIXED),
        ("time_series", "ts_config", TimeSeriesConfig, TIME_SERIES_FIXED),
    ):
        if content.get(key) is not None:
            model[name] = kind(**read_part(key, content[key], kind, fixed, default or text.dtype))
    for key in TOKEN_ID_KEYS:
        if content.get(key) is not None:
            check_type(key, content[key], int)
            model[key] = content[key]
    if content.get("quantization_config") is not None:
        model["quantization"] = Fp8Config.from_hf(content["quantization_config"])
    return model


def _read_text(content: Any, dtype: str | None) -> TextConfig:
    where = "text_config"
    values = read_part(where, content, TextConfig, TEXT_FIXED, dtype)
    heads = values.setdefault("num_attention_heads", TextConfig.num_attention_heads)
    check_positive(f"{where}.num_attention_heads", heads)
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", values.get("hidden_size", TextConfig.hidden_size) // heads)
    values["router_n_groups"] = max(values.get("router_n_groups", 1), 1)
    scaling = content.get("rope_scaling") or content.get("rope_parameters") or {}
    check_object(f"{where}.rope_scaling", scaling)
    fope, theta = read_rope(f"{where}.rope_scaling", scaling)
    values["fope"] = None if fope is None else FopeConfig(**fope)
    if theta is not None:
        values.setdefault("rope_theta", theta)
    coef = AUX_LOSS_COEF if content.get("router_aux_loss_coef") is None else content["router_aux_loss_coef"]
    check_type(f"{where}.router_aux_loss_coef", coef, float)
    experts = values.get("num_experts_per_tok", TextConfig.num_experts_per_tok)
    # Twelve digits, so that the division that wrote the coefficient is undone exactly.
    values["router"] = RouterConfig(balance_coef=float(f"{coef * max(experts, 1):.12g}"))
    return TextConfig(**values)
