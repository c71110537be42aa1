"""A document as the model reads it: token ids with placeholders, and the contents of the placeholders (spec 5)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.examples import Example, Medium, StoredImage, StoredSignal, StoredVideo, png
from interns1pro_jax.data.image_processing import PixelBounds, grid_of
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.placeholders import VideoTokens, video_text
from interns1pro_jax.data.records import Document, ImagePart, SignalPart, TextPart, VideoPart
from interns1pro_jax.models.time_series_inputs import Signal, prepare_signal, required_sizes
from interns1pro_jax.models.vision_inputs import tokens_per_item
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import Tokenizer
from interns1pro_jax.tokenizer.chat import Conversation
from interns1pro_jax.tokenizer.messages import Message
from interns1pro_jax.tower_config import AnyVision

_MARKS = re.compile("(" + "|".join(map(re.escape, base.SPECIAL_TOKENS)) + ")")
_NO_TOWER = "the data has {}, but the model has no {} tower; set ModelConfig.{}, or prepare data without them."


@runtime_checkable
class ChatTokenizer(Protocol):
    """A tokenizer that comes with a chat template, such as the released one."""

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), expansions: Sequence[str] | None = None
    ) -> Conversation: ...


@dataclasses.dataclass(frozen=True)
class DocumentEncoder:
    """Encodes documents for one model.

    Attributes:
      tokenizer: of the model.
      model: which towers there are, and the patch sizes of the vision tower.
      bounds: how large images may be.
    """

    tokenizer: Tokenizer
    model: ModelConfig
    bounds: PixelBounds

    def encode(self, document: Document) -> Example:
        """The tokens and media of a document; images are measured, not processed.

        A conversation is rendered by the chat template and learns what its assistant writes. Any other document learns all of its text
        and ends with `<|endoftext|>`.

        Raises:
          ValueError: a medium that cannot be encoded, messages that the template refuses, or a document without tokens.
          ConfigError: a medium that the model has no tower for, or a conversation for a tokenizer without a chat template.
        """
        patches = 0
        media: list[Medium] = []
        signals: list[Signal] = []
        texts: list[str] = []  # what stands for each part
        for part in document.parts:
            match part:
                case TextPart(text):
                    texts.append(text)
                case ImagePart(pixels, content):
                    grid = grid_of(pixels.shape[0], pixels.shape[1], self._vision, self.bounds)
                    texts.append(f"{base.VISION_START}{base.IMAGE * tokens_per_item(grid, self._vision)}{base.VISION_END}")
                    patches += math.prod(grid)
                    media.append(StoredImage(png(pixels) if content is None else content, grid))
                case VideoPart(frames, seconds):
                    rows, columns = (side // self._vision.patch_size for side in frames.shape[1:3])
                    per_patch = tokens_per_item((1, rows, columns), self._vision)
                    texts.append(video_text(VideoTokens(seconds, per_patch)))
                    patches += len(seconds) * rows * columns
                    media.append(StoredVideo(frames))
                case SignalPart(samples, rate, _):
                    if self.model.time_series is None:
                        raise ConfigError(_NO_TOWER.format("signals", "time-series", "time_series"))
                    signal = prepare_signal(samples, rate)
                    texts.append(f"{base.SIGNAL_START}{base.SIGNAL * signal.tokens}{base.SIGNAL_END}")
                    signals.append(signal)
                    media.append(StoredSignal(samples.astype(np.float32), rate))
        ids, trained = self._parts(document, texts) if document.messages is None else self._conversation(document, texts)
        needed = required_sizes([signals])
        size = RowSize(len(ids), patches, needed.values, needed.rows, needed.pairs, needed.patch_width)
        return Example(ids, trained, tuple(media), size, document.name, document.tags)

    def _parts(self, document: Document, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a document that is no conversation. Its texts are only text, whatever they spell."""
        ids: list[int] = []
        trained: list[bool] = []
        for part, text in zip(document.parts, texts, strict=True):
            is_text = isinstance(part, TextPart)
            new = self.tokenizer.encode(text) if is_text else self._marked(text)
            ids += new
            trained += [is_text] * len(new)
        return np.array([*ids, self.tokenizer.special(base.END_OF_TEXT)], np.int32), np.array([*trained, True], bool)

    def _marked(self, text: str) -> list[int]:
        """Tokens of what stands for a medium: placeholders, marks, and the times of a video between them."""
        ids: list[int] = []
        for token in filter(None, _MARKS.split(text)):
            ids += [self.tokenizer.special(token)] if _MARKS.fullmatch(token) else self.tokenizer.encode(token)
        return ids

    def _conversation(self, document: Document, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(self.tokenizer, ChatTokenizer):
            raise ConfigError("a conversation needs a tokenizer with a chat template: give the directory of a release as the tokenizer.")
        encoded = self.tokenizer.encode_chat(document.messages or (), tools=document.tools, expansions=texts)
        return encoded.ids, encoded.loss_mask

    def system_prompt(self, text: str) -> np.ndarray:
        """Tokens of a system message, to be put before a document."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        return np.array([special(base.TURN_START), *encode(f"system\n{text}"), special(base.TURN_END), *encode("\n")], np.int32)

    @property
    def _vision(self) -> AnyVision:
        if self.model.vision is None:
            raise ConfigError(_NO_TOWER.format("images", "vision", "vision"))
        return self.model.vision
