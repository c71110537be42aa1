"""Images, videos and signals of a prompt as inputs of the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.time_series_inputs import Signal, pack_time_series
from interns1pro_jax.models.vision_inputs import VisionItem, pack_vision, tokens_per_item
from tools.parity.golden import Golden

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Media:
    """What the placeholders of a batch stand for, each kind in reading order."""

    images: Sequence[VisionItem] = ()
    videos: Sequence[VisionItem] = ()
    signals: Sequence[Signal] = ()


NO_MEDIA = Media()


def read_media(golden: Golden, prefix: str = "") -> Media:
    """The media among a file's inputs: pixels with their grids, a signal with its rate."""

    def items(pixels: str, grids: str) -> list[VisionItem]:
        if prefix + pixels not in golden:
            return []
        grid = next((name for name in (prefix + grids, prefix + "grid_thw") if name in golden), grids)
        return split_items(golden.input(prefix + pixels), golden.input(grid))

    images, videos = items("pixel_values", "image_grid_thw"), items("pixel_values_videos", "video_grid_thw")
    return Media(images, videos, _read_signals(golden, prefix))


def _read_signals(golden: Golden, prefix: str) -> list[Signal]:
    """One `signal` [length, channels]; or `signals` [n, length, channels], padded after `lengths`; or `signal<i>`, `signal_<i>`.
    `sampling_rate` is one for all, or one each, or `sampling_rate<i>`, `sampling_rate_<i>`."""
    numbered = sorted((int(match[2]), match[1]) for name in golden if (match := re.fullmatch(rf"{prefix}signal(_?(\d+))", name)))
    if numbered:
        values = [golden.input(f"{prefix}signal{suffix}") for _, suffix in numbered]
    elif prefix + "signals" in golden:
        padded = golden.input(prefix + "signals")
        lengths = golden.get(prefix + "lengths", np.full(len(padded), padded.shape[1]))
        values = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    elif prefix + "signal" in golden:
        values = [golden.input(prefix + "signal")]
    else:
        return []
    if numbered and f"{prefix}sampling_rate{numbered[0][1]}" in golden:
        rates = np.array([float(golden.input(f"{prefix}sampling_rate{suffix}")) for _, suffix in numbered])
    else:
        rates = np.broadcast_to(golden.input(prefix + "sampling_rate"), len(values))
    return [Signal(value, float(rate)) for value, rate in zip(values, rates, strict=True)]


def split_items(patches: np.ndarray, grids: np.ndarray) -> list[VisionItem]:
    """Packed patches [P, patch_dim], as images or videos of these grids [n, 3].

    Raises:
      ValueError: the grids do not add up to the patches.
    """
    sizes = [int(np.prod(grid)) for grid in grids]
    if sum(sizes) != len(patches):
        raise ValueError(f"{len(patches)} patches do not fill the grids {grids.tolist()}, which have {sum(sizes)}.")
    ends = np.cumsum([0, *sizes])
    return [VisionItem(patches[start:end], (int(t), int(h), int(w))) for start, end, (t, h, w) in zip(ends, ends[1:], grids, strict=False)]


def model_inputs(
    config: ModelConfig,
    tokens_BT: np.ndarray,
    valid_BT: np.ndarray,
    positions_BT: np.ndarray,
    media: Media = NO_MEDIA,
    *,
    rows: int | None = None,
) -> ModelInputs:
    """The first `rows` rows of a batch (all by default), with their media in one pack.

    Raises:
      ValueError: the placeholders of a kind are not as many as the embeddings of its contents.
    """
    vision = series = None
    if media.images or media.videos:
        assert config.vision is not None, "the batch has images or videos, but the config has no vision_config"
        frames = vision_rows(tokens_BT, media.images, media.videos, config)[:rows]
        vision = pack_vision([[item for row in frames for item in row]], config.vision)
    if media.signals:
        assert config.time_series is not None, "the batch has signals, but the config has no ts_config"
        signals = _by_row(tokens_BT, {config.ts_token_id: list(media.signals)}, lambda signal: signal.tokens)[:rows]
        series = pack_time_series([[signal for row in signals for signal in row]], config.time_series)
    tokens, positions, segments = (jnp.asarray(a[:rows], jnp.int32) for a in (tokens_BT, positions_BT, valid_BT))
    return ModelInputs(tokens, positions, segments, vision=vision, time_series=series)


def vision_rows(
    tokens_BT: np.ndarray, images: Sequence[VisionItem], videos: Sequence[VisionItem], config: ModelConfig
) -> list[list[VisionItem]]:
    """Brings images and videos, each in reading order, into the one reading order of the placeholders; a list for each row.

    The tower reads both alike, frame by frame, so a video is cut into its frames: text, or an image, may stand between them.

    Raises:
      ValueError: the placeholders of a kind are not as many as its embeddings, or those of one frame are not together.
    """
    assert config.vision is not None
    tower = config.vision
    contents = {config.image_token_id: _frames(images), config.video_token_id: _frames(videos)}
    return _by_row(tokens_BT, contents, lambda item: tokens_per_item(item.grid, tower))


def _frames(items: Sequence[VisionItem]) -> list[VisionItem]:
    return [VisionItem(frame, (1, h, w)) for patches, (t, h, w) in items for frame in np.reshape(patches, (t, h * w, -1))]


def _by_row(tokens_BT: np.ndarray, contents: dict[int, list[Item]], size: Callable[[Item], int]) -> list[list[Item]]:
    """Deals the contents of several placeholder ids out to the rows, in reading order."""
    for token, items in contents.items():
        placeholders, embeddings = int((tokens_BT == token).sum()), sum(map(size, items))
        if placeholders != embeddings:
            raise ValueError(f"the tokens have {placeholders} placeholders of id {token}, but the contents give {embeddings} embeddings.")
    left = {token: list(items) for token, items in contents.items()}
    rows: list[list[Item]] = []
    for number, row in enumerate(tokens_BT):
        placeholders, taken = row[np.isin(row, list(left))], []
        while len(placeholders):
            item = left[int(placeholders[0])].pop(0)
            run, placeholders = placeholders[: size(item)], placeholders[size(item) :]
            if len(run) < size(item) or (run != run[0]).any():
                raise ValueError(f"row {number}: the {size(item)} placeholders of one item are not together.")
            taken.append(item)
        rows.append(taken)
    return rows
