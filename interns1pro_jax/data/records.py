"""Documents as readers make them: text, images, videos and signals in reading order, and where they come from.

What training reads is their encoded form (`examples`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from interns1pro_jax.tokenizer import base


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
    """Text; `trained` where a model is to learn to write it."""

    text: str
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class MarkPart:
    """A special token by its name."""

    token: str
    trained: bool = False


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


Part = TextPart | MarkPart | ImagePart | VideoPart | SignalPart


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One training document.

    Attributes:
      parts: in reading order.
      source: name of the collection it comes from.
      licence: terms under which it may be used.
      identifier: unique within the source.
      tags: what it is, for selection and statistics.
      conversation: whether it ends with its last turn; other documents end with `<|endoftext|>`.
    """

    parts: tuple[Part, ...]
    source: str
    licence: str
    identifier: str
    tags: tuple[str, ...] = ()
    conversation: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}:{self.identifier}"


def turn(role: str, parts: tuple[Part, ...], trained: bool) -> tuple[Part, ...]:
    """A turn of a conversation in the form of the released chat template (spec 5.4): marks, role, contents.

    Args:
      trained: whether a model learns to write the contents and the mark that ends them.
    """
    contents = tuple(dataclasses.replace(part, trained=trained) if isinstance(part, TextPart) else part for part in parts)
    begin = (MarkPart(base.TURN_START), TextPart(f"{role}\n", trained=False))
    return (*begin, *contents, MarkPart(base.TURN_END, trained), TextPart("\n", trained=False))
