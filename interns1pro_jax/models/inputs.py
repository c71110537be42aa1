"""What the model reads: tokens, and the packed contents of their image, video and time-series placeholders.

Media are packed: a pack is a flat run of vision patches or signal samples, with index arrays (computed on the host) that say
which of them belong together. The leading axis P counts packs. Pack p holds the media of rows p*B/P .. (p+1)*B/P-1 of the
batch, in reading order (row after row, position after position). P = 1 serves a single prompt or batch; P = B, or any
multiple of the mesh's batch shards that divides B, lets every device encode the media of its own rows.

Every array has a static shape; padding is marked by zero in the id arrays, and changes nothing.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionInputs:
    """Patches of images and videos, made by `models.vision_inputs.pack_vision`.

    Attributes:
      patches: pixel values of each patch in the order (channel, frame, y, x); patches of a frame in merge order (spec 3).
      frame_ids: 1, 2, ... for the patches of one frame of one image or video; 0 for padding. Attention stays within a frame.
      position_index, position_weight: the four rows of the learned position table and their bilinear weights.
      row_col: row and column of the patch within its frame, for the rotary encoding.

    The tower turns every `merge**2` consecutive patches into one embedding.
    """

    patches: Float[Array, "P I patch_dim"]
    frame_ids: Int[Array, "P I"]
    position_index: Int[Array, "P I 4"]
    position_weight: Float[Array, "P I 4"]
    row_col: Int[Array, "P I 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeSeriesInputs:
    """Signals of any length, rate and channel count, made by `models.time_series_inputs.pack_time_series`.

    Attributes:
      values: the samples of all signals of a pack, each signal as its contiguous [length, channels] memory, zero-padded at its
        end to a whole number of patches (spec 4.1).
      row_start: where each row of the patch encoder starts in `values`. A row is one of the C runs of `patch` consecutive
        values that make up a [patch, C] block (the memory reinterpretation of spec 4.2). Longer rows come first.
      row_length: samples in the row (the patch length of its signal); 0 for padding.
      row_patch: index of the patch that the row belongs to; patches 2i and 2i+1 are concatenated (spec 4.3).
      row_weight: 1 / channels, the weight of the row in its patch's mean; 0 for padding.
      pair_ids: 1, 2, ... for the patch pairs of one signal, 0 for padding. A signal starts at an even pair.
      pair_position: index of the pair within its signal.
      patch_width: static upper bound of `row_length`; rows are processed at this width at most.

    The tower turns pairs 2t and 2t+1 into the embedding t, which is padding where `pair_ids[2t]` is 0.
    """

    values: Float[Array, "P X"]
    row_start: Int[Array, "P R"]
    row_length: Int[Array, "P R"]
    row_patch: Int[Array, "P R"]
    row_weight: Float[Array, "P R"]
    pair_ids: Int[Array, "P pairs"]
    pair_position: Int[Array, "P pairs"]
    patch_width: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """One batch of sequences.

    Attributes:
      tokens: token ids; image, video and time-series placeholders included.
      positions: position of each token in its document, from 0 (the Fourier encoding is not shift-invariant, spec 10).
      segment_ids: 1, 2, ... for the documents packed in a row, 0 for padding. Attention stays within a document.
      vision, time_series: contents of the placeholders; None where the batch has none.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    vision: VisionInputs | None = None
    time_series: TimeSeriesInputs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One training batch: what the model reads, and the token that each position should predict (-100: none)."""

    inputs: ModelInputs
    labels: Int[Array, "B T"]
