"""Image files: pixels upright and in 8 bits, and hostile files named before they are unpacked."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from interns1pro_jax.data.media.images import read_image
from interns1pro_jax.data.media.limits import ImageLimits, MediaError, Reason

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def file_of(array, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_pixels_of_lossless_files(format, tmp_path):
    content = file_of(PIXELS, format)
    np.testing.assert_array_equal(read_image(content), PIXELS)
    (tmp_path / "image.bin").write_bytes(content)  # the content tells the format, not the name
    for path in (tmp_path / "image.bin", str(tmp_path / "image.bin")):
        np.testing.assert_array_equal(read_image(path), PIXELS)


def test_sixteen_bits_are_scaled_not_cut_off():
    levels = np.array([[0, 1000, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(read_image(file_of(levels))[0, :, 0], [0, 4, 128, 255])
    for format in ("PNG", "TIFF"):
        assert read_image(file_of(levels, format)).shape == (1, 4, 3)
    with pytest.raises(MediaError, match=r"32 bits \(mode F\)") as found:
        read_image(file_of(levels.astype(np.float32), "TIFF"))
    assert found.value.reason == Reason.UNSUPPORTED


def test_images_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: shown after a quarter turn clockwise
    np.testing.assert_array_equal(read_image(file_of(PIXELS, exif=exif.tobytes())), np.rot90(PIXELS, -1))


def test_of_a_file_with_previews_the_picture_is_read():
    content = file_of(PIXELS, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(PIXELS[:4, :5])])
    np.testing.assert_array_equal(read_image(content), np.asarray(Image.open(io.BytesIO(file_of(PIXELS, "JPEG", quality=95)))))


def png(width, height, data=b""):
    """A PNG whose header says what it likes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 14_000, 60_000])
def test_bombs_are_refused_before_they_are_unpacked(side):
    bomb = png(side, side, zlib.compress(bytes(3 * 10**6), 9))
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="pixels") as found:
            read_image(bomb, name="bomb")
        assert found.value.reason == Reason.TOO_LARGE and str(found.value).startswith("bomb: ")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_limits_are_those_that_are_given():
    content = file_of(PIXELS)
    np.testing.assert_array_equal(read_image(content, limits=ImageLimits(max_pixels=600)), PIXELS)
    with pytest.raises(MediaError, match="30 x 20 pixels, more than max_pixels=599"):
        read_image(content, limits=ImageLimits(max_pixels=599))
    with pytest.raises(MediaError, match=r"bytes, more than max_bytes=100"):
        read_image(content, limits=ImageLimits(max_bytes=100))


def test_damage_is_named(tmp_path):
    content = file_of(PIXELS)
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    for broken, reason, message in (
        (b"", Reason.EMPTY, "no bytes"),
        (content[: len(content) // 2], Reason.UNREADABLE, "image"),
        (content[:60], Reason.UNREADABLE, "image"),
        (b"GIF89a" + bytes(3), Reason.UNREADABLE, "image"),
        (b"%PDF-1.7", Reason.UNREADABLE, "image"),
        (png(0, 5), Reason.UNREADABLE, "image"),
        (animated.getvalue(), Reason.UNSUPPORTED, "2 frames; give it as a video"),
    ):
        with pytest.raises(MediaError, match=message) as found:
            read_image(broken, name="figure 3")
        assert found.value.reason == reason and str(found.value).startswith("figure 3: ")
    with pytest.raises(MediaError, match="cannot be opened") as found:
        read_image(tmp_path / "absent.png")
    assert found.value.reason == Reason.MISSING
