"""Frames of a video file: counted first, then only the sampled ones are kept, at the size at which the model reads them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.media.limits import MediaError, Reason, Source, VideoLimits, check_size, decoding, named, opened, optional_module
from interns1pro_jax.data.video_processing import VIDEO_BOUNDS, FrameSampling, patch_seconds, resize_frame, resize_video, sample_frames
from interns1pro_jax.tower_config import AnyVision

# Containers that hold their own pictures: FFmpeg also knows playlists, whose entries it would fetch from wherever they point.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif,apng,ivf"

_COMPLETE = 0.95  # of the frames that a header promises; some are no exact promise


@dataclasses.dataclass(frozen=True)
class VideoProbe:
    """What a video file is: frames (counted, not taken from the header), their rate in 1/s (None if the file has none), and size."""

    frames: int
    frame_rate: float | None
    height: int
    width: int


@dataclasses.dataclass(frozen=True, eq=False)
class SampledVideo:
    """Frames as the model reads them.

    Attributes:
      frames: resized; `video_processing.video_item` makes patches of them.
      indices: which frames of the file they are.
      seconds: the time of each temporal patch.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    indices: list[int]
    seconds: list[float]


def probe_video(source: Source, *, name: str | None = None, limits: VideoLimits | None = None) -> VideoProbe:
    """Reads a video's packets, but decodes only its first frame.

    Raises:
      MediaError: absent, over the limits, damaged, of another format, or without pictures.
    """
    limits = limits or VideoLimits()
    source, name = named(source, name, "video")
    with _pictures(source, name, limits) as (container, stream):
        rate = float(stream.average_rate) if stream.average_rate else None
        frames = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        promised = stream.frames
        if not promised and rate and container.duration and len(container.streams) == 1:
            promised = round(rate * container.duration / 1e6)  # in microseconds; that of sound may be longer than that of pictures
    if frames < _COMPLETE * promised:
        raise MediaError(Reason.UNREADABLE, name, f"holds {frames} of the {promised} frames that its header promises; it was cut short.")
    if not 0 < frames <= limits.max_frames:
        reason = Reason.TOO_LARGE if frames else Reason.EMPTY
        raise MediaError(reason, name, f"has {frames:,} frames; between 1 and max_frames={limits.max_frames:,} are read: cut the video.")
    first = next(_decoded(source, name, limits), None)
    if first is None:
        raise MediaError(Reason.UNREADABLE, name, f"holds {frames} frames of which none can be decoded; the file is damaged.")
    return VideoProbe(frames, rate, *first.shape[:2])


def read_video(
    source: Source,
    config: AnyVision,
    *,
    sampling: FrameSampling | None = None,
    bounds: PixelBounds = VIDEO_BOUNDS,
    name: str | None = None,
    limits: VideoLimits | None = None,
) -> SampledVideo:
    """Samples a video's frames and resizes each as soon as it is decoded: memory is that of the result and a few frames.

    Args:
      source: a local file, or the bytes of one.
      config: of the tower that reads it.
      sampling, bounds: how many frames, and how large all of them together may be.
      name: for messages; default the path.
      limits: what the file may cost.

    Raises:
      MediaError: as `probe_video`; or fewer frames can be decoded than the file holds, or it is too short or small for the model.
    """
    limits = limits or VideoLimits()
    source, name = named(source, name, "video")
    probe = probe_video(source, name=name, limits=limits)
    try:
        indices = sample_frames(probe.frames, probe.frame_rate, sampling)
        height, width = resize_video(len(indices), probe.height, probe.width, config, bounds)
    except ValueError as error:
        raise MediaError(Reason.UNSUPPORTED, name, str(error)) from error
    wanted, frames = set(indices), np.empty((len(indices), height, width, 3), np.uint8)
    found = 0
    for index, frame in enumerate(_decoded(source, name, limits)):
        if index in wanted:
            if frame.shape[:2] != (probe.height, probe.width):
                raise MediaError(
                    Reason.UNSUPPORTED,
                    name,
                    f"changes its size from {probe.height} x {probe.width} to {frame.shape[0]} x {frame.shape[1]} pixels at frame {index}; "
                    "cut it there.",
                )
            frames[found] = resize_frame(frame, height, width)
            found += 1
        if index == indices[-1]:
            break
    if found < len(indices):
        raise MediaError(
            Reason.UNREADABLE, name, f"holds {probe.frames} frames, but frame {indices[found]} cannot be decoded; the file is damaged."
        )
    return SampledVideo(frames, indices, patch_seconds(indices, probe.frame_rate, config))


@contextlib.contextmanager
def _pictures(source: Path | bytes, name: str, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """The opened file and its first stream of pictures; what FFmpeg raises inside becomes a MediaError."""
    av = optional_module("av", name, "videos")
    check_size(source, name, limits.max_bytes)
    with opened(source) as file, decoding(name, "a video"), av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
        if not container.streams.video:
            raise MediaError(Reason.UNSUPPORTED, name, "has no pictures; a recording of sound is a signal.")
        stream = container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        if height * width > limits.max_pixels:
            raise MediaError(
                Reason.TOO_LARGE,
                name,
                f"has frames of {height} x {width} pixels, more than max_pixels={limits.max_pixels:,}; shrink it or raise the limit.",
            )
        yield container, stream


def _decoded(source: Path | bytes, name: str, limits: VideoLimits) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames in order of time, upright."""
    with _pictures(source, name, limits) as (container, stream):
        for frame in container.decode(stream):
            yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
