"""Videos: sampled frames, sizes, patches and prompts of the official processor; files of every container; hostile ones named."""

import json
import struct

import numpy as np
import pytest

from interns1pro_jax.config import VisionConfig
from interns1pro_jax.data.image_processing import PixelBounds, patches_of
from interns1pro_jax.data.media.limits import MediaError, Reason, VideoLimits
from interns1pro_jax.data.media.videos import probe_video, read_video
from interns1pro_jax.data.placeholders import VideoTokens, expand_placeholders
from interns1pro_jax.data.video_processing import FrameSampling, patch_seconds, resize_frame, resize_video, sample_frames, video_item
from interns1pro_jax.models.vision_inputs import tokens_per_item

CONFIG = VisionConfig()


def test_golden_videos(reference):
    golden = np.load(reference / "preprocess" / "videos.npz")
    for case in json.loads((reference / "preprocess" / "videos.json").read_text()):
        indices = sample_frames(case["num_frames"], case["fps"])
        assert indices == case["sampled_indices"]
        size = resize_video(len(indices), case["height"], case["width"], CONFIG)
        frames = np.stack([resize_frame(golden[f"{case['key']}.frames"][index], *size) for index in indices])
        item = video_item(frames, CONFIG)
        assert list(item.grid) == case["video_grid_thw"]
        error = np.abs(item.patches * 127.5 + 127.5 - golden[f"{case['key']}.pixel_values_u8"])
        assert error.mean() < 0.15 and error.max() <= 2.001  # Pillow's bicubic
        seconds = patch_seconds(indices, case["fps"], CONFIG)
        expanded = expand_placeholders(case["text"], videos=[VideoTokens(seconds, tokens_per_item(item.grid, CONFIG) // item.grid[0])])
        assert expanded == case["decoded"]


def test_golden_sizes(reference):
    table = json.loads((reference / "preprocess" / "smart_resize.json").read_text())
    bounds = PixelBounds(table["video_params"]["min_pixels"], table["video_params"]["max_pixels"])
    rejected = 0
    for frames, height, width, new_height, new_width in table["video"]:
        if new_height is None:
            rejected += 1
            with pytest.raises(ValueError, match=r"a video of"):
                resize_video(frames, height, width, CONFIG, bounds)
        else:
            assert resize_video(frames, height, width, CONFIG, bounds) == (new_height, new_width), (frames, height, width)
    assert rejected


def test_golden_image_prompt(reference):
    case = json.loads((reference / "preprocess" / "image_prompt.json").read_text())
    counts = [int(np.prod(grid)) // CONFIG.spatial_merge_size**2 for grid in case["image_grid_thw"]]
    expanded = expand_placeholders(case["rendered"], images=counts)
    assert expanded.count("<|image_pad|>") == sum(counts) == case["input_ids"].count(151655)


def test_placeholders_without_media_are_an_error_and_the_reverse():
    with pytest.raises(ValueError, match="2 image placeholders, but 1 images are given"):
        expand_placeholders("<|image_pad|> <|image_pad|>", images=[3])
    with pytest.raises(ValueError, match="0 signal placeholders, but 1 signals are given"):
        expand_placeholders("no place", signals=[3])
    lone = expand_placeholders("<|video_pad|>", videos=[VideoTokens([0.25], 2)])
    assert lone == "<0.2 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert expand_placeholders("<|ts|><TS_CONTEXT><|/ts|>", signals=[2]) == "<|ts|><TS_CONTEXT><TS_CONTEXT><|/ts|>"


def test_sampling():
    assert sample_frames(100, 25.0) == np.rint(np.linspace(0, 99, 8)).astype(int).tolist()
    assert sample_frames(100, None) == sample_frames(100, 24.0)
    assert sample_frames(3, 1000.0) == [0, 1, 2]
    assert len(sample_frames(10**6, 1.0)) == 768
    assert sample_frames(50, 25.0, FrameSampling(frames=5)) == [0, 12, 24, 37, 49]
    with pytest.raises(ValueError, match="6 frames are wanted of a video that has 5"):
        sample_frames(5, 25.0, FrameSampling(frames=6))
    with pytest.raises(ValueError, match="0 frames"):
        sample_frames(0, 25.0)


def test_a_still_video_has_the_patches_of_the_image_and_an_odd_end_is_repeated():
    frame = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    other = 255 - frame
    item = video_item(np.stack([frame, frame, other]), CONFIG)
    assert item.grid == (2, 2, 4)
    np.testing.assert_array_equal(item.patches, np.concatenate([patches_of(frame, CONFIG), patches_of(other, CONFIG)]))
    with pytest.raises(ValueError, match="30 x 64 pixels are no multiples of 32"):
        video_item(np.zeros((2, 30, 64, 3), np.uint8), CONFIG)


def write(path, codec, frames=31, height=64, width=96, rate=10, bright=None):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            pixels = np.full((height, width, 3), 8 * i, np.uint8)
            if bright is not None:
                pixels[bright] = 255
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")])
def test_files_of_every_container(tmp_path, suffix, codec):
    path = write(tmp_path / f"x.{suffix}", codec)
    probe = probe_video(path)
    assert (probe.frames, probe.frame_rate, probe.height, probe.width) == (31, 10.0, 64, 96)
    video = read_video(path, CONFIG)
    assert video.indices == [0, 6, 12, 18, 24, 30] and video.seconds == pytest.approx([0.3, 1.5, 2.7])
    assert video.frames.shape == (6, 64, 96, 3)
    levels = video.frames.reshape(6, -1).mean(1)
    np.testing.assert_allclose(levels, 8 * np.array(video.indices), atol=6)
    np.testing.assert_array_equal(read_video(path.read_bytes(), CONFIG).frames, video.frames)
    small = read_video(path, CONFIG, bounds=PixelBounds(1, 6 * 32 * 32), sampling=FrameSampling(frames=2))
    assert small.frames.shape[1:3] == resize_video(2, 64, 96, CONFIG, PixelBounds(1, 6 * 32 * 32)) and small.indices == [0, 30]


def test_videos_are_upright(tmp_path):
    content = bytearray(write(tmp_path / "x.mp4", "mpeg4", frames=8, bright=np.s_[:, :48]).read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the display, as a telephone held upright writes it: a quarter turn clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    frames = read_video(bytes(content), CONFIG).frames
    assert frames.shape[1:3] == (96, 64)
    assert frames[:, :40].min() > 200 and frames[:, 56:].max() < 100


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    whole = write(tmp_path / "x.mkv", "mpeg4").read_bytes()
    film = write(tmp_path / "x.mp4", "mpeg4").read_bytes()
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:10,\n{tmp_path / 'x.mp4'}\n#EXT-X-ENDLIST\n")
    for broken, reason, message in (
        (whole[: len(whole) // 2], Reason.UNREADABLE, r"holds \d+ of the 31 frames that its header promises"),
        (film[: len(film) // 2], Reason.UNREADABLE, "video"),
        (b"", Reason.EMPTY, "no bytes"),
        (b"not a film", Reason.UNREADABLE, "video"),
        (tmp_path / "list.m3u8", Reason.UNREADABLE, "video"),
        (tmp_path / "absent.mp4", Reason.MISSING, "cannot be opened"),
        (write(tmp_path / "short.mkv", "mpeg4", frames=1), Reason.UNSUPPORTED, "1 frames is shorter than a patch"),
        (write(tmp_path / "tiny.mkv", "mpeg4", height=16), Reason.UNSUPPORTED, "16 x 96 pixels is smaller than 32 x 32"),
    ):
        with pytest.raises(MediaError, match=message) as found:
            read_video(broken, CONFIG)
        assert found.value.reason == reason
    for limits, message in (
        (VideoLimits(max_bytes=100), r"max_bytes=100"),
        (VideoLimits(max_pixels=6143), r"64 x 96 pixels, more than max_pixels=6,143"),
        (VideoLimits(max_frames=30), r"31 frames; between 1 and max_frames=30"),
    ):
        with pytest.raises(MediaError, match=message) as found:
            read_video(whole, CONFIG, limits=limits)
        assert found.value.reason == Reason.TOO_LARGE
