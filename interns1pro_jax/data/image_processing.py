"""Images as patches in merge order: at native resolution, in whole merge blocks (spec 5.1), or for InternViT cut into tiles."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from interns1pro_jax.models.vision_inputs import VisionItem
from interns1pro_jax.tower_config import AnyVision, InternVitConfig

MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class PixelBounds:
    """Smallest and largest area of an image after resizing, in pixels. The defaults are the released processor's."""

    smallest: int = 65536
    largest: int = 16777216


def smart_resize(height: int, width: int, factor: int, bounds: PixelBounds) -> tuple[int, int]:
    """The size nearest to `height` x `width` whose sides are multiples of `factor` and whose area lies within `bounds`.

    Sides are rounded half to even. The aspect ratio is kept as far as whole multiples allow.

    Raises:
      ValueError: an empty image, or one whose sides differ by more than a factor of 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height} x {width} pixels is empty.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"an image of {height} x {width} pixels has an aspect ratio above {MAX_ASPECT}; crop it.")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > bounds.largest:
        shrink = math.sqrt(height * width / bounds.largest)
        new_height, new_width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < bounds.smallest:
        grow = math.sqrt(bounds.smallest / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image: grey is replicated, alpha dropped, 16-bit grey (microscopes, detectors) scaled to 8 bits.

    Pillow itself would cut 16-bit values off at 255.

    Raises:
      ValueError: values of 32 bits, whose black and white nobody but the image's author knows.
    """
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        return np.repeat(((levels * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, -1)
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of 32 bits (mode {image.mode}), whose range is not known; scale them to 8 or 16 bits.")
    return np.asarray(image.convert("RGB"))


def grid_of(height: int, width: int, config: AnyVision, bounds: PixelBounds) -> tuple[int, int, int]:
    """Patches (frames, rows, columns) that an image of this size becomes; see `image_item`. Tiles are frames; `bounds` are no matter to
    them."""
    if isinstance(config, InternVitConfig):
        rows, columns = tiles_of(height, width, config)
        return rows * columns + (rows * columns > 1), config.tile_side, config.tile_side
    height, width = smart_resize(height, width, config.patch_size * config.spatial_merge_size, bounds)
    return 1, height // config.patch_size, width // config.patch_size


def tiles_of(height: int, width: int, config: InternVitConfig) -> tuple[int, int]:
    """Rows and columns of tiles that an image of this size is cut into: of all with `min_tiles` to `max_tiles` tiles those whose aspect is
    nearest to the image's, and of equal ones the largest that is less than twice the image's area (after the transformers library's
    `get_optimal_tiled_canvas`).

    Raises:
      ValueError: an empty image.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height} x {width} pixels is empty.")
    counts = range(1, config.max_tiles + 1)
    arrangements = [(c, r) for c in counts for r in counts if config.min_tiles <= c * r <= config.max_tiles]
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(arrangements, key=math.prod):
        distance = abs(width / height - columns / rows)
        small = 2 * height * width <= config.image_size**2 * columns * rows
        if distance < nearest or (distance == nearest and not small):
            best, nearest = (columns, rows), distance
    return best[1], best[0]


def image_item(pixels: UInt8[np.ndarray, "height width 3"], config: AnyVision, bounds: PixelBounds) -> VisionItem:
    """Resizes an image (bicubic, antialiased, rounded to whole grey levels) and cuts it into the patches of the vision tower.

    Raises:
      ValueError: as `smart_resize`.
    """
    return item_of_grid(pixels, grid_of(pixels.shape[0], pixels.shape[1], config, bounds), config)


def item_of_grid(pixels: UInt8[np.ndarray, "height width 3"], grid: tuple[int, int, int], config: AnyVision) -> VisionItem:
    """As `image_item`, of a grid that was chosen before."""
    if isinstance(config, InternVitConfig):
        return VisionItem(_tile_patches(pixels, config), grid)
    height, width = (count * config.patch_size for count in grid[1:])
    if (height, width) != pixels.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    return VisionItem(patches_of(pixels, config), grid)


def _tile_patches(pixels: UInt8[np.ndarray, "height width 3"], config: InternVitConfig) -> Float[np.ndarray, "patches patch_dim"]:
    """Patches of an image's tiles, row after row of tiles, and where there are several, of the whole image as one more tile."""
    rows, columns = tiles_of(pixels.shape[0], pixels.shape[1], config)
    side, image = config.image_size, Image.fromarray(pixels)
    whole = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
    tiles = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))[None]])
    return patches_of_frames(tiles, config)


def patches_of(pixels: UInt8[np.ndarray, "height width 3"], config: AnyVision) -> Float[np.ndarray, "patches patch_dim"]:
    """Normalised patches of an image of fitting size, merge block after merge block; a still image fills every frame of a patch."""
    frames = np.broadcast_to(pixels, (config.temporal_patch_size, *pixels.shape))
    return patches_of_frames(frames, config)


def patches_of_frames(pixels: UInt8[np.ndarray, "frames height width 3"], config: AnyVision) -> Float[np.ndarray, "patches patch_dim"]:
    """Normalised patches of frames of fitting size and number: patch by patch in time, in each merge block by merge block."""
    side, merge, depth = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    frames, height, width, channels = pixels.shape
    rows, columns = height // (side * merge), width // (side * merge)
    x = pixels.reshape(frames // depth, depth, rows, merge, side, columns, merge, side, channels)
    # temporal patch, row, column, row and column in the block, channel, frame, y, x
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, config.patch_dim)
    if isinstance(config, InternVitConfig):
        mean, std = (np.repeat(np.asarray(v, np.float32), side**2) for v in (config.image_mean, config.image_std))
        return (x.astype(np.float32) / np.float32(255) - mean) / std
    return (x.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
