"""Videos: which frames are taken, at what size, as which patches, and how their times are written (spec 5.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from interns1pro_jax.data.image_processing import MAX_ASPECT, PixelBounds, patches_of_frames
from interns1pro_jax.models.vision_inputs import VisionItem
from interns1pro_jax.tower_config import AnyVision

RATE_WHERE_UNKNOWN = 24.0  # frames per second; what the released processor assumes

# Smallest and largest volume of a video after sampling and resizing, in pixels of all frames. The released processor's.
VIDEO_BOUNDS = PixelBounds(4096, 25165824)


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """How many frames are taken; the defaults are the released processor's.

    Attributes:
      rate: frames per second of the video's own time.
      frames: a fixed number of frames instead.
      fewest, most: bounds of the number that `rate` gives.
    """

    rate: float = 2.0
    frames: int | None = None
    fewest: int = 4
    most: int = 768

    def __post_init__(self) -> None:
        if not self.rate > 0 or not 1 <= self.fewest <= self.most or (self.frames is not None and self.frames < 1):
            raise ValueError(f"{self}: rate and frames must be positive, and 1 <= fewest <= most.")


def sample_frames(total: int, frame_rate: float | None, sampling: FrameSampling | None = None) -> list[int]:
    """Indices of the frames to take, evenly from the first to the last, rounded half to even.

    Args:
      total: frames of the video.
      frame_rate: of the video, in 1/s; None where it is not known.

    Raises:
      ValueError: no frames, a rate that is not positive, or more frames wanted than there are.
    """
    sampling, frame_rate = sampling or FrameSampling(), RATE_WHERE_UNKNOWN if frame_rate is None else frame_rate
    if total < 1 or not 0 < frame_rate < math.inf:
        raise ValueError(f"a video of {total} frames at {frame_rate} frames per second cannot be sampled.")
    if sampling.frames is not None:
        if sampling.frames > total:
            raise ValueError(f"{sampling.frames} frames are wanted of a video that has {total}; ask for fewer, or give a rate.")
        count = sampling.frames
    else:
        count = min(max(int(total / frame_rate * sampling.rate), sampling.fewest), sampling.most, total)
    return np.rint(np.linspace(0, total - 1, count)).astype(int).tolist()


def resize_video(frames: int, height: int, width: int, config: AnyVision, bounds: PixelBounds = VIDEO_BOUNDS) -> tuple[int, int]:
    """The size of every frame: sides in whole merge blocks, rounded half to even, the volume of all frames within `bounds`.

    Raises:
      ValueError: fewer frames than a patch is deep, a frame smaller than a merge block, or sides that differ by more than a factor of 200.
    """
    factor, depth = config.patch_size * config.spatial_merge_size, config.temporal_patch_size
    if frames < depth:
        raise ValueError(f"a video of {frames} frames is shorter than a patch of {depth}; give it as an image.")
    if min(height, width) < factor:
        raise ValueError(f"a video of {height} x {width} pixels is smaller than {factor} x {factor}; enlarge it.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a video of {height} x {width} pixels has an aspect ratio above {MAX_ASPECT}; crop it.")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / depth) * depth * new_height * new_width
    if volume > bounds.largest:
        shrink = math.sqrt(frames * height * width / bounds.largest)
        new_height, new_width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif volume < bounds.smallest:
        grow = math.sqrt(bounds.smallest / (frames * height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def resize_frame(frame: UInt8[np.ndarray, "height width 3"], height: int, width: int) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Bicubic, antialiased, rounded to whole grey levels."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def video_item(frames: UInt8[np.ndarray, "frames height width 3"], config: AnyVision) -> VisionItem:
    """Patches of frames of fitting size (`resize_video`); the last frame fills up the last patch.

    Raises:
      ValueError: sides that are no whole merge blocks.
    """
    factor = config.patch_size * config.spatial_merge_size
    height, width = frames.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(f"frames of {height} x {width} pixels are no multiples of {factor}; resize them with resize_video.")
    missing = -len(frames) % config.temporal_patch_size
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    grid = (len(frames) // config.temporal_patch_size, height // config.patch_size, width // config.patch_size)
    return VisionItem(patches_of_frames(frames, config), grid)


def patch_seconds(indices: Sequence[int], frame_rate: float | None, config: AnyVision) -> list[float]:
    """The time of each temporal patch, midway between its first and its last frame, in seconds."""
    frame_rate = RATE_WHERE_UNKNOWN if frame_rate is None else frame_rate
    depth = config.temporal_patch_size
    filled = [*indices, *[indices[-1]] * (-len(indices) % depth)]
    times = [index / frame_rate for index in filled]
    return [(times[i] + times[i + depth - 1]) / 2 for i in range(0, len(times), depth)]
