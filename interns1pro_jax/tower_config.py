"""Configuration of the towers; `config` joins them with the text decoder."""

from __future__ import annotations

import dataclasses
import math

from interns1pro_jax.config_checks import check_divides, check_dtypes, check_fields, check_sizes, require

_NORMS = ("layer_norm", "rms_norm")


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
        check_sizes(
            self, "depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
            "spatial_merge_size", "in_channels", "num_position_embeddings", "out_hidden_size",
        )  # fmt: skip
        check_dtypes(self)
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

    @property
    def pack_unit(self) -> int:
        """What the patches of a pack are a multiple of: one embedding's."""
        return self.spatial_merge_size**2

    @property
    def merger_width(self) -> int:
        """Width of the hidden layer between the last block and the text."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class InternVitConfig:
    """InternViT, the tower of Intern-S1 and Intern-S1-mini, with its projector. It sees square tiles of one size, into which images are
    cut. Defaults are Intern-S1's (6 B parameters).

    Attributes:
      norm_type: `rms_norm`, or `layer_norm` with biases.
      use_qk_norm: RMS norm of queries and keys, over all heads together.
      spatial_merge_size: side of the square of patches that makes one embedding (the released format's `1 / downsample_ratio`).
      min_tiles, max_tiles: how many tiles an image may become; more than one get a small picture of the whole in addition.
      image_mean, image_std: of the pixels' normalisation, red, green, blue, of values from 0 to 1.
    """

    depth: int = 45
    hidden_size: int = 3200
    num_heads: int = 25
    intermediate_size: int = 12800
    image_size: int = 448
    patch_size: int = 14
    in_channels: int = 3
    attention_bias: bool = False
    use_qk_norm: bool = True
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float = 0.1
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    min_tiles: int = 1
    max_tiles: int = 12
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    temporal_patch_size = 1  # every frame is a tile of its own

    def __post_init__(self) -> None:
        check_fields(self)
        check_sizes(
            self, "depth", "hidden_size", "num_heads", "intermediate_size", "image_size", "patch_size", "in_channels",
            "spatial_merge_size", "out_hidden_size", "min_tiles", "max_tiles",
        )  # fmt: skip
        check_dtypes(self)
        check_divides("vision hidden_size", self.hidden_size, "num_heads", self.num_heads)
        check_divides("image_size", self.image_size, "patch_size * spatial_merge_size", self.patch_size * self.spatial_merge_size)
        require(self.norm_type in _NORMS, f"InternVitConfig.norm_type={self.norm_type!r} is unknown; use one of {', '.join(_NORMS)}.")
        require(self.min_tiles <= self.max_tiles, f"min_tiles={self.min_tiles} is more than max_tiles={self.max_tiles}.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch, in the order (channel, y, x)."""
        return self.in_channels * self.patch_size**2

    @property
    def tile_side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_position_embeddings(self) -> int:
        """Learned positions of the patches of a tile."""
        return self.tile_side**2

    @property
    def pack_unit(self) -> int:
        """What the patches of a pack are a multiple of: one tile's."""
        return self.tile_side**2

    @property
    def merger_width(self) -> int:
        """Width of the hidden layer between the last block and the text."""
        return self.out_hidden_size


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
        check_sizes(
            self, "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions",
            "num_mel_bins", "ts_adapt_in_dim", "ts_adapt_out_dim", "ts_hidden_dim", "out_hidden_size",
        )  # fmt: skip
        check_dtypes(self)
        check_divides("time-series d_model", self.d_model, "encoder_attention_heads", self.encoder_attention_heads)
        require(
            self.ts_adapt_in_dim == 2 * self.PATCH_WIDTH,
            f"ts_adapt_in_dim={self.ts_adapt_in_dim} must be {2 * self.PATCH_WIDTH}: two patch encodings are concatenated.",
        )
        require(
            self.ts_hidden_dim == self.ts_adapt_out_dim,
            f"ts_hidden_dim={self.ts_hidden_dim} must equal ts_adapt_out_dim={self.ts_adapt_out_dim}: the encoder feeds the projector.",
        )


AnyVision = VisionConfig | InternVitConfig
"""What packs of patches are made for and read by; `models.vision` and `models.internvit` are the towers."""
