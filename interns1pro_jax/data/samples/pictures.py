"""Photographs and micrographs with captions, and handwritten digits with their labels."""

from __future__ import annotations

import colorsys
import gzip
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from interns1pro_jax.data.image_processing import to_rgb
from interns1pro_jax.data.records import Document, ImagePart, TextPart
from interns1pro_jax.data.samples.packages import Archives, Sample

SOURCE_PICTURES, SOURCE_DIGITS = "pictures", "digits"
TILE = 96  # pixels
_SHORT_SIDE = 3 * TILE
_ENLARGED = (1, 8)  # digits are shown at two sizes
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SKIMAGE, _SKLEARN = "scikit-image", "scikit-learn"
# (package, file, kind, what it shows): the last two from the documentation of the package.
_PICTURES = (
    (_SKIMAGE, "skimage/data/astronaut.png", "Photograph", "the astronaut Eileen Collins"),
    (_SKIMAGE, "skimage/data/brick.png", "Photograph", "a brick wall"),
    (_SKIMAGE, "skimage/data/camera.png", "Photograph", "a photographer with a camera"),
    (_SKIMAGE, "skimage/data/cell.png", "Micrograph", "a cell floating in saline, quantitative phase image"),
    (_SKIMAGE, "skimage/data/chelsea.png", "Photograph", "Chelsea the cat"),
    (_SKIMAGE, "skimage/data/clock_motion.png", "Photograph", "a motion-blurred wall clock"),
    (_SKIMAGE, "skimage/data/coffee.png", "Photograph", "a coffee cup"),
    (_SKIMAGE, "skimage/data/coins.png", "Photograph", "Greek coins from Pompeii"),
    (_SKIMAGE, "skimage/data/grass.png", "Photograph", "grass"),
    (_SKIMAGE, "skimage/data/gravel.png", "Photograph", "gravel"),
    (_SKIMAGE, "skimage/data/hubble_deep_field.jpg", "Astronomical image", "the Hubble eXtreme Deep Field"),
    (_SKIMAGE, "skimage/data/ihc.png", "Micrograph", "colonic glands, immunohistochemical staining"),
    (_SKIMAGE, "skimage/data/microaneurysms.png", "Medical image", "microaneurysms in the retina"),
    (_SKIMAGE, "skimage/data/moon.png", "Astronomical image", "the surface of the moon"),
    (_SKIMAGE, "skimage/data/page.png", "Scan", "a page of printed text"),
    (_SKIMAGE, "skimage/data/retina.jpg", "Medical image", "a human retina"),
    (_SKIMAGE, "skimage/data/rocket.jpg", "Photograph", "the launch of DSCOVR on a Falcon 9"),
    (_SKIMAGE, "skimage/data/text.png", "Photograph", "handwritten text"),
    (_SKLEARN, "sklearn/datasets/images/china.jpg", "Photograph", "a Chinese palace"),
    (_SKLEARN, "sklearn/datasets/images/flower.jpg", "Photograph", "a flower"),
)


def samples(archives: Archives) -> Iterator[Sample]:
    """Tiles of the pictures (a picture is a group), then the digits, each at two sizes (a digit is a group)."""
    for package, file, kind, title in _PICTURES:
        with Image.open(io.BytesIO(archives.read(package, file))) as image:
            tiles = list(_tiles(image))
        for number, tile in enumerate(tiles):
            parts = (TextPart("Image: "), ImagePart(tile), TextPart(f" {kind}, {_look(tile)}: {title}"))
            yield Sample(file, Document(parts, SOURCE_PICTURES, archives.licence(package), f"{file}[{number}]", ("image", "picture")))
    for number, (digit, pixels) in enumerate(_digits(archives)):
        for enlarged in _ENLARGED:
            parts = (
                TextPart("Image: "),
                ImagePart(pixels.repeat(enlarged, 0).repeat(enlarged, 1)),
                TextPart(f" Handwritten digit: {digit}"),
            )
            identifier = f"{number} x{enlarged}"
            yield Sample(f"digit {number}", Document(parts, SOURCE_DIGITS, archives.licence(_SKLEARN), identifier, ("image", "digit")))


def _tiles(image: Image.Image) -> Iterator[np.ndarray]:
    """Squares of TILE pixels that do not overlap, from the image scaled so that three fit along its short side."""
    scale = _SHORT_SIDE / min(image.size)
    size = (max(_SHORT_SIDE, round(image.width * scale)), max(_SHORT_SIDE, round(image.height * scale)))
    pixels = np.asarray(Image.fromarray(to_rgb(image)).resize(size, Image.Resampling.BICUBIC))
    for top in range(0, pixels.shape[0] - TILE + 1, TILE):
        for left in range(0, pixels.shape[1] - TILE + 1, TILE):
            yield pixels[top : top + TILE, left : left + TILE].copy()


def _look(pixels: np.ndarray) -> str:
    """Main colour, brightness and contrast in words."""
    hue, _, _ = colorsys.rgb_to_hsv(*(pixels.mean((0, 1)) / 255))
    spread = np.ptp(pixels.mean((0, 1)))
    names = ((0.05, "red"), (0.12, "brown"), (0.19, "yellow"), (0.45, "green"), (0.7, "blue"), (0.9, "purple"), (1.01, "red"))
    colour = "grey" if spread < 20 else next(name for limit, name in names if hue < limit)
    level = pixels.mean(-1)
    brightness = "dark" if level.mean() < 85 else "medium" if level.mean() < 170 else "bright"
    contrast = "low" if level.std() < 20 else "medium" if level.std() < 50 else "high"
    return f"{colour}, {brightness}, {contrast} contrast"


def _digits(archives: Archives) -> Iterator[tuple[str, np.ndarray]]:
    """(digit in words, pixels [8, 8, 3]); the table has 64 grey levels of 0..16, ink being 16, and the digit. Ink is white on mid-grey."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(archives.read(_SKLEARN, "sklearn/datasets/data/digits.csv.gz"))), delimiter=",")
    for row in table:
        levels = np.rint(128 + row[:64].reshape(8, 8) * (127 / 16)).astype(np.uint8)
        yield _DIGITS[int(row[64])], np.repeat(levels[..., None], 3, axis=-1)
