"""Our parameters and the tensors of released checkpoints: one declarative table for both directions (spec section 8).

What `families` says of a family (how the names of its parts begin, whether a layer's experts are one tensor) is all in which they differ.

A rule is `(our name, tensor name, layout)`. The layout names the axes of the stored tensor and of our parameter, for example
`"(Q H) D -> D Q H"`: the stored [Q*H, D] matrix is our [D, Q, H]. Parentheses merge axes, 1 is an axis of size one. Three things
are not in the layout:

    {L}, {E}       in a tensor name: one tensor per layer (expert); ours is stacked, with leading axes L (and E)
    two names      their tensors are concatenated along our last axis (gate | up)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.families import FAMILIES, Family
from interns1pro_jax.ops.fope import text_frequencies
from interns1pro_jax.tower_config import InternVitConfig

Rule = tuple[str, str | tuple[str, ...], str]

# A buffer of the released layout that is no parameter here: the sinusoids of the patch encoder (spec 4.2).
POSITION_TABLE, POSITION_ROWS = "model.time_series.encoder_embed.pos_encoder.pe", 20000

_LAYER = "layers.{L}."
_EXPERT = _LAYER + "mlp.experts.{E}."

_TEXT: tuple[Rule, ...] = (
    ("embed_VD", "embed_tokens.weight", "V D"),
    ("final_norm_D", "norm.weight", "D"),
)
_HEAD: tuple[Rule, ...] = (("lm_head_DV", "weight", "V D -> D V"),)
_FOPE_PER_HEAD: tuple[Rule, ...] = (
    ("fope.cos_coef", "rotary_emb.cos_coef", "K n m"),
    ("fope.sin_coef", "rotary_emb.sin_coef", "K n m"),
)
_FOPE_SHARED: tuple[Rule, ...] = tuple((ours, theirs, "n m") for ours, theirs, _ in _FOPE_PER_HEAD)
_DECODER_LAYER: tuple[Rule, ...] = (
    ("attention_norm_D", _LAYER + "input_layernorm.weight", "D"),
    ("attention.q_DQH", _LAYER + "self_attn.q_proj.weight", "(Q H) D -> D Q H"),
    ("attention.k_DKH", _LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    ("attention.v_DKH", _LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    ("attention.o_QHD", _LAYER + "self_attn.o_proj.weight", "D (Q H) -> Q H D"),
    ("attention.q_norm_H", _LAYER + "self_attn.q_norm.weight", "H"),
    ("attention.k_norm_H", _LAYER + "self_attn.k_norm.weight", "H"),
    ("mlp_norm_D", _LAYER + "post_attention_layernorm.weight", "D"),
)
_ATTENTION_BIAS: tuple[Rule, ...] = (
    ("attention.q_bias_QH", _LAYER + "self_attn.q_proj.bias", "(Q H) -> Q H"),
    ("attention.k_bias_KH", _LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    ("attention.v_bias_KH", _LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
    ("attention.o_bias_D", _LAYER + "self_attn.o_proj.bias", "D"),
)
_DENSE_MLP: tuple[Rule, ...] = (
    ("mlp.wi_DF", (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"), "F D -> D F"),
    ("mlp.wo_FD", _LAYER + "mlp.down_proj.weight", "D F -> F D"),
)
_ROUTER: tuple[Rule, ...] = (("moe.router.kernel_DE", _LAYER + "mlp.gate.weight", "E D -> D E"),)
_EXPERTS: tuple[Rule, ...] = (
    ("moe.wi_EDF", (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"), "F D -> D F"),
    ("moe.wo_EFD", _EXPERT + "down_proj.weight", "D F -> F D"),
)
_FUSED_GATE_UP, _FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# One tensor for each expert's matrix; or all experts of a layer in one tensor, gate | up, as Qwen3-VL-MoE was released ([in, out]), or as
# version 5 of the transformers library writes it ([out, in]).
_EXPERT_LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "separate": _EXPERTS,
    "fused": (("moe.wi_EDF", _LAYER + _FUSED_GATE_UP, "E D W"), ("moe.wo_EFD", _LAYER + _FUSED_DOWN, "E F D")),
    "fused_transposed": (
        ("moe.wi_EDF", _LAYER + _FUSED_GATE_UP, "E W D -> E D W"),
        ("moe.wo_EFD", _LAYER + _FUSED_DOWN, "E D F -> E F D"),
    ),
}

_VISION: tuple[Rule, ...] = (
    ("patch_kernel_ID", "patch_embed.proj.weight", "D c t y x -> (c t y x) D"),
    ("patch_bias_D", "patch_embed.proj.bias", "D"),
    ("position_ND", "pos_embed.weight", "N D"),
    ("blocks.norm1_scale_D", "blocks.{L}.norm1.weight", "D"),
    ("blocks.norm1_bias_D", "blocks.{L}.norm1.bias", "D"),
    ("blocks.qkv_DCQH", "blocks.{L}.attn.qkv.weight", "(C Q H) D -> D C Q H"),
    ("blocks.qkv_bias_CQH", "blocks.{L}.attn.qkv.bias", "(C Q H) -> C Q H"),
    ("blocks.proj_QHD", "blocks.{L}.attn.proj.weight", "D (Q H) -> Q H D"),
    ("blocks.proj_bias_D", "blocks.{L}.attn.proj.bias", "D"),
    ("blocks.norm2_scale_D", "blocks.{L}.norm2.weight", "D"),
    ("blocks.norm2_bias_D", "blocks.{L}.norm2.bias", "D"),
    ("blocks.fc1_DF", "blocks.{L}.mlp.linear_fc1.weight", "F D -> D F"),
    ("blocks.fc1_bias_F", "blocks.{L}.mlp.linear_fc1.bias", "F"),
    ("blocks.fc2_FD", "blocks.{L}.mlp.linear_fc2.weight", "D F -> F D"),
    ("blocks.fc2_bias_D", "blocks.{L}.mlp.linear_fc2.bias", "D"),
    ("merger.norm_scale_D", "merger.norm.weight", "D"),
    ("merger.norm_bias_D", "merger.norm.bias", "D"),
    ("merger.fc1_EF", "merger.linear_fc1.weight", "M m -> m M"),
    ("merger.fc1_bias_F", "merger.linear_fc1.bias", "M"),
    ("merger.fc2_FD", "merger.linear_fc2.weight", "O M -> M O"),
    ("merger.fc2_bias_D", "merger.linear_fc2.bias", "O"),
)

_VIT_LAYER = "encoder.layer.{L}."
_INTERNVIT: tuple[Rule, ...] = (
    ("patch_kernel_ID", "embeddings.patch_embeddings.projection.weight", "D c y x -> (c y x) D"),
    ("patch_bias_D", "embeddings.patch_embeddings.projection.bias", "D"),
    ("class_D", "embeddings.cls_token", "1 1 D -> D"),
    ("position_ND", "embeddings.position_embeddings", "1 N D -> N D"),
    ("blocks.norm1.scale_D", _VIT_LAYER + "layernorm_before.weight", "D"),
    ("blocks.q_DQH", _VIT_LAYER + "attention.q_proj.weight", "(Q H) D -> D Q H"),
    ("blocks.k_DQH", _VIT_LAYER + "attention.k_proj.weight", "(Q H) D -> D Q H"),
    ("blocks.v_DQH", _VIT_LAYER + "attention.v_proj.weight", "(Q H) D -> D Q H"),
    ("blocks.proj_QHD", _VIT_LAYER + "attention.projection_layer.weight", "D (Q H) -> Q H D"),
    ("blocks.proj_bias_D", _VIT_LAYER + "attention.projection_layer.bias", "D"),
    ("blocks.scale1_D", _VIT_LAYER + "lambda_1", "D"),
    ("blocks.norm2.scale_D", _VIT_LAYER + "layernorm_after.weight", "D"),
    ("blocks.fc1_DF", _VIT_LAYER + "mlp.fc1.weight", "F D -> D F"),
    ("blocks.fc1_bias_F", _VIT_LAYER + "mlp.fc1.bias", "F"),
    ("blocks.fc2_FD", _VIT_LAYER + "mlp.fc2.weight", "D F -> F D"),
    ("blocks.fc2_bias_D", _VIT_LAYER + "mlp.fc2.bias", "D"),
    ("blocks.scale2_D", _VIT_LAYER + "lambda_2", "D"),
)
_INTERNVIT_LAYER_NORM: tuple[Rule, ...] = (
    ("blocks.norm1.bias_D", _VIT_LAYER + "layernorm_before.bias", "D"),
    ("blocks.norm2.bias_D", _VIT_LAYER + "layernorm_after.bias", "D"),
)
_INTERNVIT_QK_NORM: tuple[Rule, ...] = (
    ("blocks.q_norm_D", _VIT_LAYER + "attention.q_norm.weight", "D"),
    ("blocks.k_norm_D", _VIT_LAYER + "attention.k_norm.weight", "D"),
)
_INTERNVIT_BIAS: tuple[Rule, ...] = (
    ("blocks.q_bias_QH", _VIT_LAYER + "attention.q_proj.bias", "(Q H) -> Q H"),
    ("blocks.k_bias_QH", _VIT_LAYER + "attention.k_proj.bias", "(Q H) -> Q H"),
    ("blocks.v_bias_QH", _VIT_LAYER + "attention.v_proj.bias", "(Q H) -> Q H"),
)
_PROJECTOR: tuple[Rule, ...] = (
    ("norm_scale_E", "layer_norm.weight", "M"),
    ("norm_bias_E", "layer_norm.bias", "M"),
    ("fc1_EO", "linear_1.weight", "O M -> M O"),
    ("fc1_bias_O", "linear_1.bias", "O"),
    ("fc2_OO", "linear_2.weight", "O o -> o O"),
    ("fc2_bias_O", "linear_2.bias", "O"),
)

_PATCH_LAYER = "encoder_embed.transformer_encoder.layers.0."
_PATCH_ENCODER: tuple[Rule, ...] = (
    ("conv_XD", "encoder_embed.conv.weight", "D 1 X -> X D"),
    ("conv_bias_D", "encoder_embed.conv.bias", "D"),
    ("qkv_DCQH", _PATCH_LAYER + "self_attn.in_proj_weight", "(C Q H) D -> D C Q H"),
    ("qkv_bias_CQH", _PATCH_LAYER + "self_attn.in_proj_bias", "(C Q H) -> C Q H"),
    ("out_QHD", _PATCH_LAYER + "self_attn.out_proj.weight", "D (Q H) -> Q H D"),
    ("out_bias_D", _PATCH_LAYER + "self_attn.out_proj.bias", "D"),
    ("norm1_scale_D", _PATCH_LAYER + "norm1.weight", "D"),
    ("norm1_bias_D", _PATCH_LAYER + "norm1.bias", "D"),
    ("norm2_scale_D", _PATCH_LAYER + "norm2.weight", "D"),
    ("norm2_bias_D", _PATCH_LAYER + "norm2.bias", "D"),
    ("fc1_DF", _PATCH_LAYER + "linear1.weight", "F D -> D F"),
    ("fc1_bias_F", _PATCH_LAYER + "linear1.bias", "F"),
    ("fc2_FD", _PATCH_LAYER + "linear2.weight", "D F -> F D"),
    ("fc2_bias_D", _PATCH_LAYER + "linear2.bias", "D"),
)
_TIME_SERIES: tuple[Rule, ...] = (
    ("adapt_in_ED", "encoder.adapt_in.weight", "b p -> p b"),
    ("adapt_in_bias_D", "encoder.adapt_in.bias", "b"),
    ("conv1_XDE", "encoder.conv1.weight", "D b X -> X b D"),
    ("conv1_bias_E", "encoder.conv1.bias", "D"),
    ("conv2_XEE", "encoder.conv2.weight", "D d X -> X d D"),
    ("conv2_bias_E", "encoder.conv2.bias", "D"),
    ("position_ND", "encoder.embed_positions.weight", "N D"),
    ("layers.attention_norm_scale_D", "encoder.layers.{L}.self_attn_layer_norm.weight", "D"),
    ("layers.attention_norm_bias_D", "encoder.layers.{L}.self_attn_layer_norm.bias", "D"),
    ("layers.q_DQH", "encoder.layers.{L}.self_attn.q_proj.weight", "(Q H) D -> D Q H"),
    ("layers.q_bias_QH", "encoder.layers.{L}.self_attn.q_proj.bias", "(Q H) -> Q H"),
    ("layers.k_DQH", "encoder.layers.{L}.self_attn.k_proj.weight", "(Q H) D -> D Q H"),
    ("layers.v_DQH", "encoder.layers.{L}.self_attn.v_proj.weight", "(Q H) D -> D Q H"),
    ("layers.v_bias_QH", "encoder.layers.{L}.self_attn.v_proj.bias", "(Q H) -> Q H"),
    ("layers.out_QHD", "encoder.layers.{L}.self_attn.out_proj.weight", "D (Q H) -> Q H D"),
    ("layers.out_bias_D", "encoder.layers.{L}.self_attn.out_proj.bias", "D"),
    ("layers.mlp_norm_scale_D", "encoder.layers.{L}.final_layer_norm.weight", "D"),
    ("layers.mlp_norm_bias_D", "encoder.layers.{L}.final_layer_norm.bias", "D"),
    ("layers.fc1_DF", "encoder.layers.{L}.fc1.weight", "F D -> D F"),
    ("layers.fc1_bias_F", "encoder.layers.{L}.fc1.bias", "F"),
    ("layers.fc2_FD", "encoder.layers.{L}.fc2.weight", "D F -> F D"),
    ("layers.fc2_bias_D", "encoder.layers.{L}.fc2.bias", "D"),
    ("norm_scale_D", "encoder.layer_norm.weight", "D"),
    ("norm_bias_D", "encoder.layer_norm.bias", "D"),
    ("adapt_out_DE", "encoder.adapt_out.weight", "A D -> D A"),
    ("adapt_out_bias_E", "encoder.adapt_out.bias", "A"),
    ("projector.norm_scale_D", "projector.layer_norm.weight", "A"),
    ("projector.norm_bias_D", "projector.layer_norm.bias", "A"),
    ("projector.fc1_DF", "projector.linear_1.weight", "O A -> A O"),
    ("projector.fc1_bias_F", "projector.linear_1.bias", "O"),
    ("projector.fc2_FD", "projector.linear_2.weight", "O o -> o O"),
    ("projector.fc2_bias_D", "projector.linear_2.bias", "O"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a stored tensor become those of ours. Each axis is a product of named dimensions.

    Attributes:
      stored, ours: the dimensions of each axis, in order; an empty product is an axis of size one.
      sizes: the size of every dimension.
    """

    stored: tuple[tuple[str, ...], ...]
    ours: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, text: str, sizes: Mapping[str, int]) -> Layout:
        """Reads `"(Q H) D -> D Q H"`; without an arrow the two sides are equal."""
        sides = [
            tuple(tuple(d for d in axis.strip("()").split() if d != "1") for axis in re.findall(r"\([^)]*\)|\S+", side))
            for side in text.split("->")
        ]
        names = {d for axis in sides[0] for d in axis}
        return cls(sides[0], sides[-1], {d: sizes[d] for d in sorted(names)})

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self._shape(self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape(self.ours)

    def inverse(self) -> Layout:
        """The layout that leads back: from ours to the stored one."""
        return Layout(self.ours, self.stored, self.sizes)

    def apply(self, stored: Any) -> Any:
        """Brings an array (NumPy's or JAX's) of `stored_shape` to `shape`."""
        before = [d for axis in self.stored for d in axis]
        after = [d for axis in self.ours for d in axis]
        split = stored.reshape([self.sizes[d] for d in before])
        return split.transpose([before.index(d) for d in after]).reshape(self.shape)

    def restrict(self, index: Sequence[slice]) -> tuple[tuple[slice, ...], Layout, tuple[slice, ...]]:
        """How to get the part `index` of ours without the rest of the stored tensor.

        Returns:
          the slices of the stored tensor to read; the layout of what was read; the slices of its result that are the part (the
          whole result, except where the part is not a box of the stored tensor).
        """
        kept = {d: slice(0, size) for d, size in self.sizes.items()}
        kept |= {axis[0]: part for axis, part in zip(self.ours, index, strict=True) if len(axis) == 1}
        for axis in self.stored:  # of a merged axis only a range of its first dimension is contiguous
            kept |= {d: slice(0, self.sizes[d]) for d in axis[1:]}
        stored = []
        for axis in self.stored:
            inner = math.prod(self.sizes[d] for d in axis[1:])
            outer = kept[axis[0]] if axis else slice(0, 1)
            stored.append(slice(outer.start * inner, outer.stop * inner))
        rest = [
            slice(part.start - kept[axis[0]].start, part.stop - kept[axis[0]].start) if len(axis) == 1 else part
            for axis, part in zip(self.ours, index, strict=True)
        ]
        return tuple(stored), Layout(self.stored, self.ours, {d: part.stop - part.start for d, part in kept.items()}), tuple(rest)

    def _shape(self, axes: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[d] for d in axis) for axis in axes)


@dataclasses.dataclass(frozen=True)
class HfParameter:
    """One of our parameters as tensors of the released layout.

    Attributes:
      path: attribute path in the model, joined by dots.
      names: templates of the tensors' names; several are concatenated along our last axis.
      layout: from one stored tensor to ours, without the stacked axes.
      stack: letters of our leading, stacked axes and the values that they take in the templates.
    """

    path: str
    names: tuple[str, ...]
    layout: Layout
    stack: tuple[tuple[str, range], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        *lead, last = self.layout.shape
        return (*(len(values) for _, values in self.stack), *lead, last * len(self.names))

    def tensors(self, stacked: Sequence[slice] | None = None) -> Iterator[tuple[tuple[int, ...], int, str]]:
        """(position in the stacked axes, number of the part along our last axis, tensor name), in order of position.

        Args:
          stacked: only these slices of the stacked axes; None for all.
        """
        parts = stacked if stacked is not None else [slice(0, len(values)) for _, values in self.stack]
        for position in itertools.product(*(range(part.start, part.stop) for part in parts)):
            values = {letter: among[i] for (letter, among), i in zip(self.stack, position, strict=True)}
            for number, template in enumerate(self.names):
                yield position, number, template.format(**values)


def hf_parameters(config: ModelConfig, *, experts: str | None = None) -> tuple[HfParameter, ...]:
    """Every parameter of the model with the tensors it is stored in.

    Args:
      experts: how experts are stored, "separate", "fused" or "fused_transposed" (see `expert_layout`); None: as the family's release.
    """
    family = FAMILIES[config.family]
    return (*_text(config, family, experts or family.experts), *_vision(config, family), *_time_series(config, family))


def expert_layout(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> str:
    """How the experts of a checkpoint are stored, by the shapes of its tensors."""
    text = config.text
    found = {end: shapes[name] for name in shapes for end in (_FUSED_GATE_UP, _FUSED_DOWN) if name.endswith(end)}
    if not found:
        return "separate"
    # One of the two shapes may be the same either way.
    d, f = text.hidden_size, text.moe_intermediate_size
    transposed = {_FUSED_GATE_UP: (text.num_experts, 2 * f, d), _FUSED_DOWN: (text.num_experts, d, f)}
    return "fused_transposed" if found == transposed else "fused"


def _entries(
    rules: Sequence[Rule], sizes: Mapping[str, int], path: str, prefix: str = "", layers: range | None = None, experts: range | None = None
) -> Iterator[HfParameter]:
    for ours, theirs, layout in rules:
        names = tuple(prefix + name for name in ((theirs,) if isinstance(theirs, str) else theirs))
        among = {"L": layers, "E": experts}
        stack = tuple((letter, values) for letter, values in among.items() if values is not None and f"{{{letter}}}" in names[0])
        yield HfParameter(f"{path}.{ours}", names, Layout.parse(layout, sizes), stack)


def _text(config: ModelConfig, family: Family, experts: str) -> Iterator[HfParameter]:
    text = config.text
    n = len(text_frequencies(text))
    sizes = dict(
        V=text.vocab_size, D=text.hidden_size, Q=text.num_attention_heads, K=text.num_key_value_heads, H=text.head_dim,
        E=text.num_experts, n=n, m=n,
    )  # fmt: skip
    entries = functools.partial(_entries, prefix=family.text)
    yield from entries(_TEXT, sizes, "text")
    if not text.tie_word_embeddings:
        yield from _entries(_HEAD, sizes, "text", family.head)
    if text.fope is not None:
        yield from entries(_FOPE_PER_HEAD if text.fope.sep_head else _FOPE_SHARED, sizes, "text")
    for run, (is_moe, first, count) in enumerate(text.layer_runs):
        layers = range(first, first + count)
        where = f"text.runs.{run}"
        yield from entries(_DECODER_LAYER, sizes, where, layers=layers)
        if text.attention_bias:
            yield from entries(_ATTENTION_BIAS, sizes, where, layers=layers)
        if is_moe:
            width = text.moe_intermediate_size
            rules = _ROUTER + _EXPERT_LAYOUTS[experts]
            yield from entries(rules, sizes | dict(F=width, W=2 * width), where, layers=layers, experts=range(text.num_experts))
        else:
            yield from entries(_DENSE_MLP, sizes | dict(F=text.intermediate_size), where, layers=layers)


def _vision(config: ModelConfig, family: Family) -> Iterator[HfParameter]:
    if (vision := config.vision) is None:
        return
    if isinstance(vision, InternVitConfig):
        yield from _internvit(vision, family)
        return
    merged = vision.hidden_size * vision.spatial_merge_size**2
    sizes = dict(
        D=vision.hidden_size, C=3, Q=vision.num_heads, H=vision.head_dim, F=vision.intermediate_size, N=vision.num_position_embeddings,
        c=vision.in_channels, t=vision.temporal_patch_size, y=vision.patch_size, x=vision.patch_size,
        M=merged, m=merged, O=vision.out_hidden_size,
    )  # fmt: skip
    yield from _entries(_VISION, sizes, "vision", family.vision, layers=range(vision.depth))


def _internvit(vision: InternVitConfig, family: Family) -> Iterator[HfParameter]:
    merged, out = vision.hidden_size * vision.spatial_merge_size**2, vision.out_hidden_size
    sizes = dict(
        D=vision.hidden_size, Q=vision.num_heads, H=vision.head_dim, F=vision.intermediate_size, N=1 + vision.num_position_embeddings,
        c=vision.in_channels, y=vision.patch_size, x=vision.patch_size, M=merged, O=out, o=out,
    )  # fmt: skip
    rules = _INTERNVIT
    for has, more in (
        (vision.norm_type == "layer_norm", _INTERNVIT_LAYER_NORM),
        (vision.use_qk_norm, _INTERNVIT_QK_NORM),
        (vision.attention_bias, _INTERNVIT_BIAS),
    ):
        rules += more if has else ()
    yield from _entries(rules, sizes, "vision", family.vision, layers=range(vision.depth))
    yield from _entries(_PROJECTOR, sizes, "vision.projector", family.projector)


def _time_series(config: ModelConfig, family: Family) -> Iterator[HfParameter]:
    if (series := config.time_series) is None:
        return
    patch = dict(C=3, D=series.PATCH_WIDTH, X=5, Q=series.PATCH_HEADS, H=series.PATCH_WIDTH // series.PATCH_HEADS, F=series.PATCH_FFN)
    yield from _entries(_PATCH_ENCODER, patch, "time_series.patch_encoder", family.time_series)
    width, heads = series.d_model, series.encoder_attention_heads
    sizes = dict(
        D=width, d=width, Q=heads, H=width // heads, F=series.encoder_ffn_dim, X=3, b=series.num_mel_bins, p=series.ts_adapt_in_dim,
        N=series.max_source_positions, A=series.ts_adapt_out_dim, O=series.out_hidden_size, o=series.out_hidden_size,
    )  # fmt: skip
    yield from _entries(_TIME_SERIES, sizes, "time_series", family.time_series, layers=range(series.encoder_layers))
