"""A document as the model reads it: token ids with placeholders, and the contents of the placeholders (spec 5)."""

from __future__ import annotations

import dataclasses

import numpy as np

from interns1pro_jax.config import ConfigError, ModelConfig, VisionConfig
from interns1pro_jax.data.examples import Example, Medium, StoredImage, StoredSignal, StoredVideo, png
from interns1pro_jax.data.image_processing import PixelBounds, grid_of
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import Document, ImagePart, MarkPart, SignalPart, TextPart, VideoPart
from interns1pro_jax.models.time_series_inputs import Signal, prepare_signal, required_sizes
from interns1pro_jax.models.vision_inputs import tokens_per_item
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import Tokenizer

_NO_TOWER = "the data has {}, but the model has no {} tower; set ModelConfig.{}, or prepare data without them."


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

        Raises:
          ValueError: a medium that cannot be encoded, or a document without tokens.
          ConfigError: a medium that the model has no tower for.
        """
        special = self.tokenizer.special
        ids: list[int] = []
        trained: list[bool] = []

        def append(new: list[int], learnt: bool) -> None:
            ids.extend(new)
            trained.extend([learnt] * len(new))

        def vision(placeholder: str, count: int) -> None:
            append([special(base.VISION_START), *[special(placeholder)] * count, special(base.VISION_END)], False)

        patches = 0
        media: list[Medium] = []
        signals: list[Signal] = []
        for part in document.parts:
            match part:
                case TextPart(text, learnt):
                    append(self.tokenizer.encode(text), learnt)
                case MarkPart(token, learnt):
                    append([special(token)], learnt)
                case ImagePart(pixels, content):
                    grid = grid_of(pixels.shape[0], pixels.shape[1], self._vision, self.bounds)
                    vision(base.IMAGE, tokens_per_item(grid, self._vision))
                    patches += grid[1] * grid[2]
                    media.append(StoredImage(png(pixels) if content is None else content, grid))
                case VideoPart(frames, seconds):
                    rows, columns = (side // self._vision.patch_size for side in frames.shape[1:3])
                    for second in seconds:
                        append(self.tokenizer.encode(f"<{second:.1f} seconds>"), False)
                        vision(base.VIDEO, tokens_per_item((1, rows, columns), self._vision))
                    patches += len(seconds) * rows * columns
                    media.append(StoredVideo(frames))
                case SignalPart(samples, rate, _):
                    if self.model.time_series is None:
                        raise ConfigError(_NO_TOWER.format("signals", "time-series", "time_series"))
                    signal = prepare_signal(samples, rate)
                    append([special(base.SIGNAL_START), *[special(base.SIGNAL)] * signal.tokens, special(base.SIGNAL_END)], False)
                    signals.append(signal)
                    media.append(StoredSignal(samples.astype(np.float32), rate))
        if not document.conversation:
            append([special(base.END_OF_TEXT)], True)
        if not ids:
            raise ValueError("a document without tokens cannot be learnt; drop it.")
        needed = required_sizes([signals])
        size = RowSize(len(ids), patches, needed.values, needed.rows, needed.pairs, needed.patch_width)
        return Example(np.array(ids, np.int32), np.array(trained, bool), tuple(media), size, document.name, document.tags)

    def system_prompt(self, text: str) -> np.ndarray:
        """Tokens of a system message, to be put before a document."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        return np.array([special(base.TURN_START), *encode(f"system\n{text}"), special(base.TURN_END), *encode("\n")], np.int32)

    @property
    def _vision(self) -> VisionConfig:
        if self.model.vision is None:
            raise ConfigError(_NO_TOWER.format("images", "vision", "vision"))
        return self.model.vision
