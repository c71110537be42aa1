"""Placeholders of a prompt: one per embedding of the medium, where the chat template has one per medium (spec 5.1 to 5.3).

This is done in the text, before it is encoded, as the released processor does: the times of a video's patches are text, and how text is
cut into tokens depends on what stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from interns1pro_jax.tokenizer import base

_VIDEO_MARKED = f"{base.VISION_START}{base.VIDEO}{base.VISION_END}"


class VideoTokens(NamedTuple):
    """The time of each temporal patch in seconds (`video_processing.patch_seconds`), and the embeddings of each."""

    seconds: Sequence[float]
    per_patch: int


def expand_placeholders(text: str, *, images: Sequence[int] = (), videos: Sequence[VideoTokens] = (), signals: Sequence[int] = ()) -> str:
    """The text with as many placeholders as there are embeddings.

    Args:
      text: a rendered prompt; one placeholder per medium, each kind in reading order.
      images, signals: embeddings of each.
      videos: of each, times and embeddings. Every temporal patch gets its time and its own pair of marks.

    Raises:
      ValueError: more or fewer placeholders than media of a kind.
    """
    text = _replace(text, base.IMAGE, "image", (base.IMAGE * count for count in images), len(images))
    text = _replace(text, base.SIGNAL, "signal", (base.SIGNAL * count for count in signals), len(signals))
    marked = f"(?:{re.escape(_VIDEO_MARKED)}|{re.escape(base.VIDEO)})"
    return _replace(text, marked, "video", map(video_text, videos), len(videos), is_pattern=True)


def video_text(video: VideoTokens) -> str:
    """What stands for a video: for each temporal patch its time, and its placeholders between marks."""
    patch = f"{base.VISION_START}{base.VIDEO * video.per_patch}{base.VISION_END}"
    return "".join(f"<{seconds:.1f} seconds>{patch}" for seconds in video.seconds)


def _replace(text: str, placeholder: str, kind: str, contents: Iterator[str], count: int, is_pattern: bool = False) -> str:
    pattern = re.compile(placeholder if is_pattern else re.escape(placeholder))
    found = len(pattern.findall(text))
    if found != count:
        raise ValueError(
            f"the prompt has {found} {kind} placeholders, but {count} {kind}s are given; each needs the template's placeholder."
        )
    return pattern.sub(lambda _: next(contents), text)
