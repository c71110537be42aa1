"""A document as the model reads it: token ids with placeholders, patches of its images, samples of its signals (spec 5)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from interns1pro_jax.config import ConfigError, ModelConfig, VisionConfig
from interns1pro_jax.data.image_processing import PixelBounds, grid_of, image_item
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.records import Document, ImagePart, SignalPart, TextPart
from interns1pro_jax.models.time_series_inputs import Signal, prepare_signal, required_sizes
from interns1pro_jax.models.vision_inputs import VisionItem, tokens_per_item
from interns1pro_jax.ops.losses import IGNORED
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import Tokenizer

_NO_TOWER = "the data has {}, but the model has no {} tower; set ModelConfig.{}, or prepare data without them."


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The token sequence of a document.

    Attributes:
      ids: text, and placeholders between the marks that open and close a medium; at the end `<|endoftext|>`.
      is_text: where a token is text (the end included): what a model can be asked to predict.
      signals: the signals in reading order, normalised and cut: those that the placeholders were counted for.
      size: what the document needs of a row.
    """

    ids: Int[np.ndarray, " tokens"]
    is_text: Bool[np.ndarray, " tokens"]
    signals: list[Signal]
    size: RowSize

    def labels(self, counted: Bool[np.ndarray, " tokens"] | None = None) -> Int[np.ndarray, " tokens"]:
        """For each position the next token of the document, or -100 where that is not text (or not in `counted`), or the end."""
        wanted = self.is_text if counted is None else self.is_text & counted
        labels = np.full(len(self.ids), IGNORED, np.int32)
        labels[:-1] = np.where(wanted[1:], self.ids[1:], IGNORED)
        return labels


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

    def tokenize(self, document: Document, end: bool = True) -> Tokens:
        """The token sequence; images are measured, not processed.

        Args:
          end: whether `<|endoftext|>` follows; a prompt has none.

        Raises:
          ValueError: a medium that cannot be encoded.
          ConfigError: a medium that the model has no tower for.
        """
        special = self.tokenizer.special
        ids: list[int] = []
        is_text: list[bool] = []

        def append(new: list[int], text: bool) -> None:
            ids.extend(new)
            is_text.extend([text] * len(new))

        patches = 0
        signals: list[Signal] = []
        for part in document.parts:
            match part:
                case TextPart(text):
                    append(self.tokenizer.encode(text), True)
                case ImagePart(pixels):
                    grid = grid_of(pixels.shape[0], pixels.shape[1], self._vision, self.bounds)
                    fill = [special(base.IMAGE)] * tokens_per_item(grid, self._vision)
                    append([special(base.VISION_START), *fill, special(base.VISION_END)], False)
                    patches += grid[1] * grid[2]
                case SignalPart(samples, rate, _):
                    if self.model.time_series is None:
                        raise ConfigError(_NO_TOWER.format("signals", "time-series", "time_series"))
                    signal = prepare_signal(samples, rate)
                    append([special(base.SIGNAL_START), *[special(base.SIGNAL)] * signal.tokens, special(base.SIGNAL_END)], False)
                    signals.append(signal)
        if end:
            append([special(base.END_OF_TEXT)], True)
        needed = required_sizes([signals])
        size = RowSize(len(ids), patches, needed.values, needed.rows, needed.pairs, needed.patch_width)
        return Tokens(np.array(ids, np.int32), np.array(is_text, bool), signals, size)

    @property
    def _vision(self) -> VisionConfig:
        if self.model.vision is None:
            raise ConfigError(_NO_TOWER.format("images", "vision", "vision"))
        return self.model.vision

    def images(self, document: Document) -> list[VisionItem]:
        """Patches of the images, in reading order."""
        return [image_item(part.pixels, self._vision, self.bounds) for part in document.parts if isinstance(part, ImagePart)]
