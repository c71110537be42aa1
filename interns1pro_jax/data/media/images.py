"""Pixels of an image file."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from interns1pro_jax.data.image_processing import to_rgb
from interns1pro_jax.data.media.limits import ImageLimits, MediaError, Reason, Source, check_size, decoding, named, opened

# Formats of still images whose decoders read nothing but the file itself.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
_WITH_PREVIEWS = "MPO"  # a JPEG as telephones write it: the picture, then previews or a map of brightness


def read_image(source: Source, *, name: str | None = None, limits: ImageLimits | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of a still image, upright (EXIF orientation is applied), as `image_processing.to_rgb` makes them.

    The size is checked before a pixel is unpacked.

    Args:
      source: a local file, or the bytes of one.
      name: for messages; default the path.
      limits: what the file may cost.

    Raises:
      MediaError: absent, over the limits, damaged, cut short, of another format, animated, or of values that are no grey levels.
    """
    limits = limits or ImageLimits()
    source, name = named(source, name, "image")
    check_size(source, name, limits.max_bytes)
    with warnings.catch_warnings(), opened(source) as file, decoding(name, "an image"):
        # Pillow has a limit of its own, fixed for the process; ours is stricter or wanted.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise MediaError(Reason.TOO_LARGE, name, f"unpacks to too many pixels ({error}); shrink the image.") from error
        with image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise MediaError(
                    Reason.TOO_LARGE,
                    name,
                    f"unpacks to {width} x {height} pixels, more than max_pixels={limits.max_pixels:,}; shrink it or raise the limit.",
                )
            if getattr(image, "is_animated", False) and image.format != _WITH_PREVIEWS:
                raise MediaError(
                    Reason.UNSUPPORTED, name, f"has {getattr(image, 'n_frames', 'several')} frames; give it as a video, or one frame of it."
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            try:
                return to_rgb(upright)
            except ValueError as error:
                raise MediaError(Reason.UNSUPPORTED, name, str(error)) from error
