"""Packs images and videos for the vision tower, on the host (NumPy only).

An image or video arrives as its patches and its grid (t, h, w), counted in patches. A pack is the concatenation of several of
them, padded to a bucketed size, together with everything about their geometry that the tower needs as data: one compiled
shape therefore serves every mixture of grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.models.inputs import VisionInputs
from interns1pro_jax.tower_config import AnyVision, InternVitConfig

_SMALLEST_BUCKET = 16  # embeddings


class VisionItem(NamedTuple):
    """One image (t = 1) or video.

    Attributes:
      patches: normalised pixels of each patch in the order (channel, frame, y, x); frame after frame, within a frame in merge
        order (spec 3, 5.1).
      grid: temporal patches, rows of patches and columns of patches.
    """

    patches: Float[np.ndarray, "patches patch_dim"]
    grid: tuple[int, int, int]


def tokens_per_item(grid: Sequence[int], config: AnyVision) -> int:
    """Embeddings, hence placeholder tokens, of one image or video of grid (t, h, w)."""
    return math.prod(int(n) for n in grid) // config.spatial_merge_size**2


def bucket_size(patches: int, config: AnyVision) -> int:
    """The default padded size for this many patches: a power of two of embeddings (of tiles), so that few shapes are ever compiled."""
    unit = config.pack_unit
    smallest = -(-_SMALLEST_BUCKET * config.spatial_merge_size**2 // unit)
    return unit * 2 ** (max(-(-patches // unit), smallest) - 1).bit_length()


def pack_vision(packs: Sequence[Sequence[VisionItem]], config: AnyVision, *, size: int | None = None) -> VisionInputs:
    """Packs images and videos of any sizes into arrays of static shape.

    Args:
      packs: the items of each pack, in reading order (see `models.inputs`); a pack may be empty.
      config: of the tower that reads them.
      size: patches of every pack after padding, for one compiled shape throughout a run (several processes must agree on it);
        by default the `bucket_size` of the largest pack.

    Returns:
      NumPy arrays with leading axis P = len(packs). The embeddings of a pack's items follow one another without gaps.

    Raises:
      ValueError: no pack; an item does not fit its grid or the config, or has non-finite pixels; a pack exceeds `size`.
    """
    if not packs:
        raise ValueError("no pack to make; give at least one (it may be empty).")
    checked = [[_checked(item, config, f"pack {p}, item {i}") for i, item in enumerate(items)] for p, items in enumerate(packs)]
    counts = [sum(len(item.patches) for item in items) for items in checked]
    if size is None:
        size = bucket_size(max(counts), config)
    if size <= 0 or size % config.pack_unit:
        unit = (
            f"{config.tile_side}**2={config.pack_unit}, the patches of a tile"
            if isinstance(config, InternVitConfig)
            else (f"spatial_merge_size**2={config.pack_unit}, the patches of one embedding")
        )
        raise ValueError(f"size={size} must be a positive multiple of {unit}.")
    for p, count in enumerate(counts):
        if count > size:
            raise ValueError(f"pack {p} has {count} patches, but size={size}; raise the size, move items to another pack or shrink them.")

    arrays = [_pack(items, size, config) for items in checked]
    stacked: dict[str, Any] = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
    return VisionInputs(**stacked)


def _pack(items: Sequence[VisionItem], size: int, config: AnyVision) -> dict[str, np.ndarray]:
    """The arrays of one pack, without the leading axis."""
    out = {
        "patches": np.zeros((size, config.patch_dim), np.float32),
        "frame_ids": np.zeros(size, np.int32),
        "position_index": np.zeros((size, 4), np.int32),
        "position_weight": np.zeros((size, 4), np.float32),
        "row_col": np.zeros((size, 2), np.int32),
    }
    start = frames = 0
    for patches, (t, h, w) in items:
        rows = slice(start, start + t * h * w)
        index, weight = _interpolation(h, w, config)
        out["patches"][rows] = patches
        out["frame_ids"][rows] = frames + 1 + np.repeat(np.arange(t), h * w)
        out["position_index"][rows] = np.tile(index, (t, 1))
        out["position_weight"][rows] = np.tile(weight, (t, 1))
        out["row_col"][rows] = np.tile(_merge_order(_mesh(np.arange(h), np.arange(w)), config), (t, 1))
        start, frames = rows.stop, frames + t
    return out


def _checked(item: VisionItem, config: AnyVision, where: str) -> VisionItem:
    """The item as fp32 patches and a grid of ints, or an error that names it."""
    if not isinstance(item, VisionItem):
        raise ValueError(f"{where} is a {type(item).__name__}, expected a VisionItem; give a sequence of packs, each a sequence of items.")
    patches, grid = np.asarray(item.patches), tuple(int(n) for n in item.grid)
    merge = config.spatial_merge_size
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"{where}: grid={grid} must be three positive numbers: frames, rows and columns of patches.")
    if isinstance(config, InternVitConfig) and grid[1:] != (config.tile_side,) * 2:
        raise ValueError(
            f"{where}: rows and columns of grid={grid} must be {config.tile_side}, those of a tile; cut the image into tiles of "
            f"{config.image_size} x {config.image_size} pixels."
        )
    if grid[1] % merge or grid[2] % merge:
        raise ValueError(
            f"{where}: rows and columns of grid={grid} must be divisible by spatial_merge_size={merge}; "
            f"resize the image to multiples of {merge * config.patch_size} pixels."
        )
    if patches.ndim != 2 or patches.shape[1] != config.patch_dim:
        raise ValueError(
            f"{where}: patches have shape {patches.shape}, expected [patches, {config.patch_dim}]: {config.in_channels} channels x "
            f"{config.temporal_patch_size} frames x {config.patch_size} x {config.patch_size} pixels."
        )
    if patches.shape[0] != math.prod(grid):
        raise ValueError(f"{where}: {patches.shape[0]} patches do not fill grid={grid}, which has {math.prod(grid)}.")
    if np.issubdtype(patches.dtype, np.integer):
        raise ValueError(f"{where}: patches are {patches.dtype}, expected normalised floats; map grey levels g to (g - 127.5) / 127.5.")
    patches = patches.astype(np.float32)
    if bad := int(np.count_nonzero(~np.isfinite(patches))):
        raise ValueError(f"{where}: {bad} of {patches.size} pixel values are NaN or infinite; check the file it was read from.")
    return VisionItem(patches, grid)


def _mesh(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """All pairs (row value, column value) [h, w, 2]."""
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _merge_order(x_hw: np.ndarray, config: AnyVision) -> np.ndarray:
    """[h, w, n] -> [h*w, n], each merge x merge square of patches contiguous."""
    h, w, n = x_hw.shape
    m = config.spatial_merge_size
    return x_hw.reshape(h // m, m, w // m, m, n).swapaxes(1, 2).reshape(h * w, n)


def _interpolation(h: int, w: int, config: AnyVision) -> tuple[Int[np.ndarray, "patches 4"], Float[np.ndarray, "patches 4"]]:
    """Rows of the learned position table and their bilinear weights, for a frame of h x w patches (spec 3.2)."""
    side = math.isqrt(config.num_position_embeddings)
    yx = _mesh(_linspace(side - 1, h), _linspace(side - 1, w))
    low = yx.astype(np.int32)
    high = np.minimum(low + 1, side - 1)
    part = yx - low.astype(np.float32)
    (y0, x0), (y1, x1), (dy, dx) = (np.moveaxis(a, -1, 0) for a in (low, high, part))
    one = np.float32(1)
    index = np.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1], axis=-1)
    weight = np.stack([(one - dy) * (one - dx), (one - dy) * dx, dy * (one - dx), dy * dx], axis=-1)
    return _merge_order(index, config), _merge_order(weight, config)


def _linspace(stop: int, count: int) -> np.ndarray:
    """`count` fp32 numbers from 0 to `stop`, rounded as the released model's: PyTorch steps from both ends towards the middle."""
    if count == 1:
        return np.zeros(1, np.float32)
    step = np.float32(stop) / np.float32(count - 1)
    i = np.arange(count, dtype=np.float32)
    return np.where(i < count // 2, step * i, np.float32(stop) - step * (np.float32(count - 1) - i)).astype(np.float32)
