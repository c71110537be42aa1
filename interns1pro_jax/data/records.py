"""Documents as readers make them: text, images, videos and signals in reading order, and where they come from.

What training reads is their encoded form (`examples`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


class DataError(RuntimeError):
    """Data that cannot be used: a damaged or misfitting record, file or directory. The message names it and the remedy; `reason` is its
    kind, for counting."""

    reason: str = "unusable record"


class DamagedRecord(DataError):
    """A record that its container cannot give back, or whose content contradicts itself."""

    reason = "damaged record"


class RejectedRecord(DataError):
    """A record in a user's file that is not one of the known forms."""

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TextPart:
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePart:
    """An image, as it came: resizing belongs to the reader, who knows the model. `content` is its file, where it comes from one."""

    pixels: UInt8[np.ndarray, "height width 3"]
    content: bytes | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPart:
    """A video as `media.videos.read_video` samples it: frames of fitting size, and the time of each temporal patch in seconds."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SignalPart:
    """A recording in physical units; normalisation belongs to the reader.

    Attributes:
      samples: all channels over time.
      sampling_rate: in Hz; None where time has no scale.
      unit: of the samples, for example "mV".
    """

    samples: Float[np.ndarray, "length channels"]
    sampling_rate: float | None
    unit: str


Part = TextPart | ImagePart | VideoPart | SignalPart


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One training document.

    Attributes:
      parts: in reading order; of a conversation only its media.
      source: name of the collection it comes from.
      licence: terms under which it may be used.
      identifier: unique within the source.
      tags: what it is, for selection and statistics.
      messages: of a conversation, as `tokenizer.messages` has them; the items of its media are `{"type": "image"}` and the like.
      tools: that the conversation may call.
    """

    parts: tuple[Part, ...]
    source: str
    licence: str
    identifier: str
    tags: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source}:{self.identifier}"
