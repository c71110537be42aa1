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
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A configuration that is unknown, contradictory or impossible; the message names key, value and remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    _require(by > 0 and value % by == 0, f"{name}={value} must be divisible by {by_name}={by}; change one of them.")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, int) and value > 0, f"{type(config).__name__}.{name}={value!r} must be a positive integer.")


def _check_dtypes(config: Any) -> None:
    for name in ("dtype", "param_dtype"):
        value = getattr(config, name)
        _require(value in _DTYPES, f"{type(config).__name__}.{name}={value!r} is not supported; use one of {', '.join(_DTYPES)}.")


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


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Training behaviour of the router that the released config does not describe (paper section on the router).

    Attributes:
      straight_through: backward through the dense softmax over all experts (spec 1.2); the forward is unchanged.
      temperature: tau of the straight-through softmax.
      balance_coef: weight of the load-balancing loss.
      z_coef: weight of the z-loss, mean of logsumexp(logits)^2.
    """

    straight_through: bool = True
    temperature: float = 1.0
    balance_coef: float = 1e-3
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"RouterConfig.temperature={self.temperature} must be positive.")
        _require(self.balance_coef >= 0 and self.z_coef >= 0, "RouterConfig: balance_coef and z_coef must not be negative.")


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
        _check_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "decoder_sparse_step", "max_position_embeddings",
        )  # fmt: skip
        _check_dtypes(self)
        _check_divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary encoding turns pairs.")
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        _require(not outside, f"mlp_only_layers names layers {outside}, but the model has {self.num_hidden_layers} layers.")
        if any(self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            _check_positive(self, "num_experts", "num_experts_per_tok", "router_n_groups", "moe_intermediate_size")
            _check_divides("num_experts", self.num_experts, "router_n_groups", self.router_n_groups)
            _check_divides("num_experts_per_tok", self.num_experts_per_tok, "router_n_groups", self.router_n_groups)
            _require(
                self.experts_per_group_per_token <= self.experts_per_group,
                f"num_experts_per_tok={self.num_experts_per_tok} asks for {self.experts_per_group_per_token} experts in each of "
                f"{self.router_n_groups} groups, but a group has only {self.experts_per_group}.",
            )
        if any(not self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            _check_positive(self, "intermediate_size")
        if self.fope is not None and self.fope.num_inv_freq is not None:
            _require(
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
        _check_positive(
            self, "depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
            "spatial_merge_size", "in_channels", "num_position_embeddings", "out_hidden_size",
        )  # fmt: skip
        _check_dtypes(self)
        _check_divides("vision hidden_size", self.hidden_size, "num_heads", self.num_heads)
        _require(
            self.head_dim % 4 == 0,
            f"vision hidden_size/num_heads={self.head_dim} must be divisible by 4: its rotary encoding turns row and column pairs.",
        )
        side = math.isqrt(self.num_position_embeddings)
        _require(side * side == self.num_position_embeddings, f"num_position_embeddings={self.num_position_embeddings} must be a square.")

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
        _check_positive(
            self, "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions",
            "num_mel_bins", "ts_adapt_in_dim", "ts_adapt_out_dim", "ts_hidden_dim", "out_hidden_size",
        )  # fmt: skip
        _check_dtypes(self)
        _check_divides("time-series d_model", self.d_model, "encoder_attention_heads", self.encoder_attention_heads)
        _require(
            self.ts_adapt_in_dim == 2 * self.PATCH_WIDTH,
            f"ts_adapt_in_dim={self.ts_adapt_in_dim} must be {2 * self.PATCH_WIDTH}: two patch encodings are concatenated.",
        )
        _require(
            self.ts_hidden_dim == self.ts_adapt_out_dim,
            f"ts_hidden_dim={self.ts_hidden_dim} must equal ts_adapt_out_dim={self.ts_adapt_out_dim}: the encoder feeds the projector.",
        )


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """How an FP8 checkpoint stores its matrices (spec section 7): e4m3 values, one scale per block of the [out, in] matrix."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"
    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, where: str, content: Mapping[str, Any]) -> Fp8Config:
        """Reads `quantization_config`; only the released scheme (fp8, e4m3, dynamic activations, blocks) is supported."""
        for key, value in _FP8_FIXED.items():
            _require(
                content.get(key, value) == value,
                f"{where}: quantization_config.{key}={content.get(key)!r} is not supported; only {value!r} is.",
            )
        _reject_unknown(f"{where}: quantization_config", content, set(_FP8_FIXED) | {f.name for f in dataclasses.fields(cls)})
        block = tuple(content.get("weight_block_size") or (128, 128))
        _require(
            len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block),
            f"{where}: weight_block_size={block} must be two positive integers.",
        )
        return cls(block, content.get("scale_fmt"), tuple(content.get("modules_to_not_convert") or ()))

    def to_hf(self) -> dict[str, Any]:
        return {
            **_FP8_FIXED,
            "weight_block_size": list(self.weight_block_size),
            "scale_fmt": self.scale_fmt,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }


_FP8_FIXED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


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
        for name, tower in (("vision", self.vision), ("time-series", self.time_series)):
            if tower is not None:
                _require(
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
            content, where = _load_json(path), str(path)
        if content.get("tie_word_embeddings"):
            raise ConfigError(f"{where}: tie_word_embeddings=true is not supported; this family has a separate lm_head.")
        _reject_unknown(where, content, _TOP_KEYS | {"text_config", "vision_config", "ts_config", "quantization_config"})
        _require("text_config" in content, f"{where}: text_config is missing.")
        default = content.get("dtype") or content.get("torch_dtype")
        parts: dict[str, Any] = {
            "text": _read_text(f"{where}: text_config", content["text_config"], default),
            "vision": None,
            "time_series": None,
        }
        for name, key, kind, fixed in (
            ("vision", "vision_config", VisionConfig, _VISION_FIXED),
            ("time_series", "ts_config", TimeSeriesConfig, _TIME_SERIES_FIXED),
        ):
            if content.get(key) is not None:
                values = _read_part(f"{where}: {key}", content[key], kind, fixed, default or parts["text"].dtype)
                parts[name] = kind(**values)
        ids = {key: content[key] for key in _TOKEN_ID_KEYS if content.get(key) is not None}
        quantization = content.get("quantization_config")
        return cls(**parts, **ids, quantization=None if quantization is None else Fp8Config.from_hf(where, quantization))

    def to_hf(self) -> dict[str, Any]:
        """The content of the released `config.json` for this model; `from_hf` of it gives this config back."""
        text = {k: v for k, v in dataclasses.asdict(self.text).items() if k not in ("fope", "router", "param_dtype")}
        text["mlp_only_layers"] = list(self.text.mlp_only_layers)
        text["rope_scaling"] = {"rope_type": "default"}
        if self.text.fope is not None:
            for key in ("init_factor", "sep_head"):
                text["rope_scaling"][f"fope_{key}"] = getattr(self.text.fope, key)
            text["rope_scaling"]["num_inv_freq"] = self.text.fope.num_inv_freq
        text["router_aux_loss_coef"] = self.text.router.balance_coef
        text.update(_TEXT_FIXED, model_type="interns1_pro_text")
        content: dict[str, Any] = {
            "architectures": ["InternS1ProForConditionalGeneration"],
            "model_type": "interns1_pro",
            "dtype": self.text.dtype,
            "tie_word_embeddings": False,
            "text_config": text,
            **{key: getattr(self, key) for key in _TOKEN_ID_KEYS},
        }
        if self.vision is not None:
            vision = {k: v for k, v in dataclasses.asdict(self.vision).items() if k not in ("dtype", "param_dtype")}
            content["vision_config"] = {**vision, **_VISION_FIXED, "model_type": "interns1_pro_vision"}
        if self.time_series is not None:
            series = {k: v for k, v in dataclasses.asdict(self.time_series).items() if k not in ("dtype", "param_dtype")}
            content["ts_config"] = {**series, **_TIME_SERIES_FIXED, "model_type": "interns1_pro_time_series"}
        if self.quantization is not None:
            content["quantization_config"] = self.quantization.to_hf()
        return content


# Keys of the released files with one supported value: the architecture has no other.
_TEXT_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}
_TIME_SERIES_FIXED = {
    "activation_function": "gelu", "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    "encoder_layerdrop": 0.0, "scale_embedding": False,
}  # fmt: skip
_TOKEN_ID_KEYS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "ts_token_id", "ts_start_token_id", "ts_end_token_id",
)  # fmt: skip
# Keys without effect on the model's numbers.
_COMMON_KEYS = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "output_router_logits",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "_name_or_path", "_attn_implementation",
    "attn_implementation", "initializer_range", "return_dict", "output_hidden_states", "output_attentions", "auto_map",
}  # fmt: skip
_TOP_KEYS = _COMMON_KEYS | set(_TOKEN_ID_KEYS) | {"vocab_size", "hidden_size", "name_or_path"}


def _reject_unknown(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    _require(not unknown, f"{where}: unknown keys {unknown}; remove them, or check the spelling against the released config.json.")


def _read_part(where: str, content: Any, kind: type, fixed: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The fields of dataclass `kind` found in `content`, after checking that nothing else there matters."""
    _require(isinstance(content, Mapping), f"{where} must be a JSON object, not {type(content).__name__}.")
    fields = {f.name for f in dataclasses.fields(kind)} - {"dtype", "param_dtype", "fope", "router"}
    _reject_unknown(where, content, fields | set(fixed) | _COMMON_KEYS | {"rope_scaling", "rope_parameters", "router_aux_loss_coef"})
    for key, value in fixed.items():
        _require(content.get(key, value) == value, f"{where}: {key}={content.get(key)!r} is not supported; only {value!r} is.")
    values = {k: v for k, v in content.items() if k in fields}
    stored = content.get("dtype") or content.get("torch_dtype") or dtype or "bfloat16"
    return {**values, "dtype": stored, "param_dtype": stored}


def _read_text(where: str, content: Any, dtype: str | None) -> TextConfig:
    values = _read_part(where, content, TextConfig, _TEXT_FIXED, dtype)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", TextConfig.num_attention_heads)
    if values.get("head_dim") is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values["mlp_only_layers"] = tuple(values.get("mlp_only_layers") or ())
    values["router_n_groups"] = max(int(values.get("router_n_groups") or 1), 1)
    scaling = dict(content.get("rope_scaling") or content.get("rope_parameters") or {})
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    _require(rope_type == "default", f"{where}: rope_scaling.rope_type={rope_type!r} is not supported; only 'default' is.")
    if (theta := scaling.pop("rope_theta", None)) is not None:
        values.setdefault("rope_theta", theta)
    keys = ("fope_init_factor", "fope_sep_head", "num_inv_freq", "fope_num_inv_freq")
    _reject_unknown(f"{where}.rope_scaling", scaling, set(keys))
    factor, sep_head, *counts = (scaling.get(key) for key in keys)
    count = counts[0] if counts[0] is not None else counts[1]
    values["fope"] = None  # Fourier encoding is on iff any of its keys is set (spec 2.3)
    if factor is not None or sep_head is not None or count is not None:
        values["fope"] = FopeConfig(
            init_factor=FopeConfig.init_factor if factor is None else factor, sep_head=bool(sep_head), num_inv_freq=count
        )
    if content.get("router_aux_loss_coef") is not None:
        values["router"] = RouterConfig(balance_coef=content["router_aux_loss_coef"])
    return TextConfig(**values)


def _load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; names the file where it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a directory or file of the released layout.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    _require(isinstance(content, dict), f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content
