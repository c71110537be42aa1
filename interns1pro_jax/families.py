"""The families of released models, as their `config.json` and the names of their tensors show them.

Intern-S1-Pro's ancestors are the same blocks at other sizes, so a family is data: which of our fields its files have, under which keys,
and how its tensors' names begin. `config` reads and writes `config.json` by it, `checkpoint.hf_names` names tensors by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from interns1pro_jax.config_checks import ConfigError


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How a `config.json` describes the text decoder.

    Attributes:
      model_type: what its part says it is.
      defaults: values of `TextConfig` fields where their key is absent (the defaults of the official class).
      fixed: keys with one supported value.
      absent: fields that the format has no key for; they have their default.
      ignored: keys without effect on the numbers of text, besides those of every format.
      has_fope: whether there may be Fourier position encoding.
    """

    model_type: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    absent: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    has_fope: bool = False


_EXPERT_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob",
)  # fmt: skip
_NO_EXPERTS = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
_QWEN3 = {
    "vocab_size": 151936, "rope_theta": 1e4, "max_position_embeddings": 32768, "router_n_groups": 1, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN3, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
}  # fmt: skip
_NO_WINDOW = {"use_sliding_window": False}
_WINDOW = ("sliding_window", "max_window_layers")

TEXT_FORMATS = {
    text.model_type: text
    for text in (
        TextFormat("interns1_pro_text", {"router_n_groups": 1}, {}, has_fope=True),
        TextFormat("qwen3_moe", _QWEN3_MOE, _NO_WINDOW, absent=("router_n_groups",), ignored=_WINDOW),
        TextFormat(
            "qwen3",
            {
                **_QWEN3, **_NO_EXPERTS, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
                "intermediate_size": 22016,
            },
            _NO_WINDOW,
            absent=("router_n_groups", *_EXPERT_FIELDS),
            ignored=_WINDOW,
        ),
        TextFormat(
            "qwen3_vl_moe_text",
            {
                **_QWEN3_MOE, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632, "rope_theta": 5e5,
                "max_position_embeddings": 128000, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                "norm_topk_prob": True,
            },
            _NO_WINDOW,
            absent=("router_n_groups", "norm_topk_prob"),
            ignored=(*_WINDOW, "norm_topk_prob", "mrope_section", "mrope_interleaved"),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of released models.

    Attributes:
      model_type: what `config.json` says the model is; the family's name.
      architecture: the official class.
      texts: the formats that its text decoder may have.
      text_key: where `config.json` describes the decoder; None: at the top level.
      text, head, vision, projector, time_series: how the names of the parts' tensors begin; "" where there is no such part.
      vision_type: the `model_type` of the vision tower's part.
      tiles: whether the tower is InternViT, which sees tiles of one size, instead of the one of any size.
      experts: how experts are stored, a name of `checkpoint.hf_names.expert_layout`.
      tied: whether the embedding is the output head too where `config.json` does not say.
      media_keys: ids of placeholders and marks that `config.json` gives.
      untouched: how the names of tensors begin that belong to the family's models, but not to ours.
      kept: keys of `config.json` (`part.key`) that describe those.
    """

    model_type: str
    architecture: str
    texts: tuple[str, ...]
    text: str
    text_key: str | None = "text_config"
    head: str = "lm_head."
    vision: str = ""
    projector: str = ""
    vision_type: str = ""
    tiles: bool = False
    time_series: str = ""
    experts: str = "separate"
    tied: bool = False
    media_keys: tuple[str, ...] = ()
    untouched: str = ""
    kept: tuple[str, ...] = ()


_VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "interns1_pro",
            "InternS1ProForConditionalGeneration",
            ("interns1_pro_text",),
            "model.language_model.",
            vision="model.visual.",
            vision_type="interns1_pro_vision",
            time_series="model.time_series.",
            media_keys=(*_VISION_IDS, "ts_token_id", "ts_start_token_id", "ts_end_token_id"),
        ),
        Family("qwen3", "Qwen3ForCausalLM", ("qwen3",), "model.", text_key=None),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3_moe",), "model.", text_key=None),
        # Intern-S1 and Intern-S1-mini; the code for them comes with the weights.
        Family(
            "interns1",
            "InternS1ForConditionalGeneration",
            ("qwen3_moe", "qwen3"),
            "model.language_model.",
            vision="model.vision_tower.",
            projector="model.multi_modal_projector.",
            vision_type="interns1_vision",
            tiles=True,
            media_keys=("image_token_id",),
        ),
        # The same model in the transformers library.
        Family(
            "internvl",
            "InternVLForConditionalGeneration",
            ("qwen3_moe", "qwen3"),
            "language_model.model.",
            head="language_model.lm_head.",
            vision="vision_tower.",
            projector="multi_modal_projector.",
            vision_type="internvl_vision",
            tiles=True,
            tied=True,
            media_keys=("image_token_id",),
        ),
        # Its tower has outputs of several depths, and images have positions in three dimensions: only its text is a model here.
        Family(
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            ("qwen3_vl_moe_text",),
            "model.language_model.",
            experts="fused",
            media_keys=_VISION_IDS,
            untouched="model.visual.",
            kept=("vision_config", "text_config.rope_scaling", "text_config.rope_parameters"),
        ),
    )
}
RELEASED = "interns1_pro"


def family_of(model_type: Any, architectures: Any = None) -> Family:
    """The family of a `config.json`; Intern-S1-Pro for one that says nothing of it.

    Raises:
      ConfigError: it is none of ours, or its architecture is another than its type; the message lists those that are known.
    """
    if model_type is None and not architectures:
        return FAMILIES[RELEASED]
    known = "; ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())
    named = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    by_class = [family for family in FAMILIES.values() if [family.architecture] == architectures]
    found = named or (by_class[0] if by_class and model_type is None else None)
    if found is None:
        what = f"model_type={model_type!r}" if model_type is not None else f"architectures={architectures!r}"
        raise ConfigError(f"{what} is no family of models known here; these are: {known}.")
    if architectures and architectures != [found.architecture]:
        raise ConfigError(
            f"architectures={architectures!r} does not belong to model_type={found.model_type!r}, whose class is {found.architecture}; "
            f"known are: {known}."
        )
    return found
