"""What people are shown is what was made: encodings decode back, pages list every sample. T, Y, X as in gallery.py."""

import io
import json
import math
import re
from html.parser import HTMLParser

import av
import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, ImageSequence

from dit_video import gallery
from dit_video.gallery import Sample


class Store(MemoryFileSystem):
    """An object store in memory, under the name of s3://."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


def moving_square(frames=9, height=32, width=48):
    """A bright square on a dark ground that moves right by two pixels a frame."""
    video_TxYxXx3 = np.full((frames, height, width, 3), (30, 40, 70), np.uint8)
    for t in range(frames):
        video_TxYxXx3[t, 8:20, 2 * t : 2 * t + 12] = (220, 60, 50)
    return video_TxYxXx3


def few_colours(rng, frames, height, width):
    """Noise in 256 colours."""
    palette_256x3 = rng.choice(1 << 24, 256, replace=False).astype("<u4").view(np.uint8).reshape(256, 4)[:, :3]
    return palette_256x3[rng.integers(0, 256, (frames, height, width))]


def decode_mp4(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(stream)]
        return np.stack([pixels for pixels, _ in frames]), [time for _, time in frames], stream.average_rate


def decode_gif(data):
    image = Image.open(io.BytesIO(data))
    frames = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    return np.stack([pixels for pixels, _ in frames]), [ms for _, ms in frames], image.info


@pytest.mark.parametrize("fps", [8, 23.976, 30000 / 1001, 60])
def test_mp4_decodes_to_the_same_video(fps):
    video_TxYxXx3 = moving_square()
    decoded_TxYxXx3, times, rate = decode_mp4(gallery.mp4_bytes(video_TxYxXx3, fps, scale=8))
    assert decoded_TxYxXx3.shape == (9, 256, 384, 3)
    np.testing.assert_allclose(float(rate), fps, rtol=1e-6)
    np.testing.assert_allclose(times, np.arange(9) / fps, atol=1e-4)
    # The middle of each enlarged pixel is free of the blur that halved colour resolution leaves at its edges.
    np.testing.assert_allclose(decoded_TxYxXx3[:, 4::8, 4::8].astype(int), video_TxYxXx3, atol=8)


def test_mp4_names_its_colours():
    """Without these tags a player guesses BT.601 or BT.709 by the size of the picture, and colours shift."""
    with av.open(io.BytesIO(gallery.mp4_bytes(moving_square(), 8))) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 31), (2, 33, 299), (2, 301, 7)])
def test_any_size_becomes_an_mp4(shape):
    """4:2:0 needs even sizes; the odd row or column repeats its neighbour."""
    rng = np.random.default_rng(0)
    video_TxYxXx3 = np.broadcast_to(rng.integers(0, 256, (shape[0], 1, 1, 3), dtype=np.uint8), (*shape, 3))
    decoded_TxYxXx3, _, _ = decode_mp4(gallery.mp4_bytes(video_TxYxXx3, 10, scale=1))
    assert decoded_TxYxXx3.shape == (shape[0], shape[1] + shape[1] % 2, shape[2] + shape[2] % 2, 3)
    np.testing.assert_allclose(decoded_TxYxXx3.astype(int) - video_TxYxXx3[:, :1, :1], 0, atol=4)


@pytest.mark.parametrize(("encode", "decode"), [(gallery.mp4_bytes, decode_mp4), (gallery.gif_bytes, decode_gif)])
def test_small_videos_are_enlarged_and_large_ones_are_not(encode, decode):
    assert decode(encode(moving_square(), 8))[0].shape[1:3] == (192, 288)
    assert decode(encode(moving_square(2, 300, 400), 8))[0].shape[1:3] == (300, 400)


@pytest.mark.parametrize(("fps", "scale"), [(7, 1), (8, 3), (24000 / 1001, 1), (50, 2)])
def test_gif_keeps_frames_colours_and_time(fps, scale):
    video_TxYxXx3 = few_colours(np.random.default_rng(0), 11, 12, 20)
    decoded_TxYxXx3, delays_ms, info = decode_gif(gallery.gif_bytes(video_TxYxXx3, fps, scale))
    np.testing.assert_array_equal(decoded_TxYxXx3, video_TxYxXx3.repeat(scale, axis=1).repeat(scale, axis=2))
    assert info["loop"] == 0  # for ever
    starts = np.cumsum([0, *delays_ms])
    np.testing.assert_allclose(starts, 1000 * np.arange(12) / fps, atol=5)


def test_gif_above_50_fps_drops_frames_and_keeps_its_speed():
    video_TxYxXx3 = few_colours(np.random.default_rng(0), 12, 8, 8)
    decoded_TxYxXx3, delays_ms, _ = decode_gif(gallery.gif_bytes(video_TxYxXx3, 120, scale=1))
    np.testing.assert_array_equal(decoded_TxYxXx3, video_TxYxXx3[::3])
    assert min(delays_ms) >= 20
    assert sum(delays_ms) == 100


def test_gif_of_many_colours_is_close_and_does_not_flicker():
    """One palette for all frames: where the video stands still, so does the GIF."""
    ramp = np.linspace(0, 255, 64)
    still_YxXx3 = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), axis=-1).astype(np.uint8)
    video_TxYxXx3 = np.stack([still_YxXx3] * 5)
    for t in range(5):
        video_TxYxXx3[t, :8] = np.random.default_rng(t).integers(0, 256, (8, 64, 3))
    decoded_TxYxXx3, _, _ = decode_gif(gallery.gif_bytes(video_TxYxXx3, 8, scale=1))
    np.testing.assert_array_equal(decoded_TxYxXx3[:, 8:], decoded_TxYxXx3[:1, 8:].repeat(5, axis=0))
    error = decoded_TxYxXx3[:, 8:].astype(int) - video_TxYxXx3[:, 8:]
    assert np.sqrt(np.mean(error**2)) < 12


def test_png_frames_are_exact(tmp_path):
    video_TxYxXx3 = np.random.default_rng(0).integers(0, 256, (3, 17, 31, 3), dtype=np.uint8)
    gallery.write_frames(tmp_path / "new" / "clip", np.repeat(video_TxYxXx3, 2, 0))
    gallery.write_frames(tmp_path / "new" / "clip", video_TxYxXx3)  # none of the longer one is left
    names = sorted(path.name for path in (tmp_path / "new" / "clip").iterdir())
    assert names == ["f0000.png", "f0001.png", "f0002.png"]
    read = [np.asarray(Image.open(tmp_path / "new" / "clip" / name)) for name in names]
    np.testing.assert_array_equal(np.stack(read), video_TxYxXx3)
    gallery.write_png(tmp_path / "new" / "clip" / "f-own.png", video_TxYxXx3[0])
    gallery.write_frames(tmp_path / "new" / "clip", video_TxYxXx3[:1])
    assert sorted(path.name for path in (tmp_path / "new" / "clip").iterdir()) == ["f-own.png", "f0000.png"]


@pytest.mark.parametrize("encode", [gallery.mp4_bytes, gallery.gif_bytes])
def test_what_is_not_a_video_is_refused(encode):
    with pytest.raises(ValueError, match=r"float32 \(2, 8, 8, 3\): it must be uint8"):
        encode(np.zeros((2, 8, 8, 3), np.float32), 8)
    with pytest.raises(ValueError, match=r"uint8 \(8, 8, 3\)"):
        encode(np.zeros((8, 8, 3), np.uint8), 8)
    with pytest.raises(ValueError, match=r"\(0, 8, 8, 3\)"):
        encode(np.zeros((0, 8, 8, 3), np.uint8), 8)
    for fps in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="fps="):
            encode(np.zeros((2, 8, 8, 3), np.uint8), fps)


class Page(HTMLParser):
    """The page as a browser reads it: its text, its tags, and what they refer to."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.references = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


HOSTILE = "<script>alert('x')</script> & \"two\" ../../etc"


def samples(seed=0):
    extra = {"guidance": np.float32(3.0), "interval": (0.0, math.inf), "levels": np.array([1.0, 0.5]), "config": "c.py"}
    return [
        Sample(moving_square(), 8, HOSTILE, seed, extra),
        Sample(moving_square(frames=1), 8, "", seed + 1),
        Sample(moving_square(height=48, width=32), 12.5, "走る犬", seed + 2, {"steps": 24}),
    ]


def test_page_lists_every_sample_and_its_files(tmp_path):
    page_path = gallery.write_samples(tmp_path, samples(), "A run <b>", {"depth": "<6>"})
    page = Page(page_path.read_text())
    assert "script" not in page.tags
    assert page.tags.count("b") == 1  # the section's heading, not the title's
    for words in (
        HOSTILE,
        "(no prompt)",
        "走る犬",
        "A run <b>",
        "<6>",
        "48×32",
        "32×48",
        "9 frames",
        "12.5 fps",
        "seed 2",
    ):
        assert words in page.text, words
    assert page.tags.count("img") == 3
    for reference in page.references:
        assert re.fullmatch(r"[a-z0-9.-]+", reference), reference
        assert (tmp_path / reference).stat().st_size > 0
    written = {path.name for path in tmp_path.iterdir()} - {"index.html"}
    assert written == set(page.references)
    assert sorted(path.suffix for path in tmp_path.glob("001*")) == [".png"]


def test_samples_json_says_how_to_make_each_again(tmp_path):
    gallery.write_samples(tmp_path, samples(), "A run", {"depth": 6}, every_frame=True)
    text = (tmp_path / "samples.json").read_text()
    group = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert group["title"] == "A run"
    assert group["summary"] == {"depth": 6}
    for sample, record in zip(samples(), group["samples"], strict=True):
        frames, height, width, _ = sample.video_TxYxXx3.shape
        assert (record["prompt"], record["seed"], record["fps"]) == (sample.prompt, sample.seed, sample.fps)
        assert (record["frames"], record["height"], record["width"]) == (frames, height, width)
        first_YxXx3 = np.asarray(Image.open(tmp_path / record["files"]["png"]))
        np.testing.assert_array_equal(first_YxXx3, sample.video_TxYxXx3[0])
        assert len(list((tmp_path / record["name"]).glob("f*.png"))) == (frames if frames > 1 else 0)
    assert group["samples"][0]["guidance"] == 3.0
    assert [float(v) for v in group["samples"][0]["interval"]] == [0.0, math.inf]
    assert group["samples"][0]["levels"] == [1.0, 0.5]


def test_gallery_shows_each_step_once_and_the_newest_first(tmp_path):
    for step, seed in [(100, 10), (20000, 20), (3000, 30), (20000, 40)]:  # resumed from 3000, 20000 again
        gallery.grow(tmp_path, step, samples(seed), "runs/a")
    page = Page((tmp_path / "index.html").read_text())
    assert re.findall(r"Step ([\d,]+)", page.text) == ["20,000", "3,000", "100"]
    assert page.tags.count("img") == 9
    assert "seed 40" in page.text
    assert "seed 20" not in page.text
    assert all((tmp_path / reference).exists() for reference in page.references)


def test_a_torn_step_does_not_stop_the_gallery(tmp_path):
    gallery.grow(tmp_path, 1, samples())
    gallery.grow(tmp_path, 2, samples())
    torn = tmp_path / "step_00000001" / "samples.json"
    torn.write_bytes(torn.read_bytes()[:200])
    gallery.grow(tmp_path, 3, samples())
    assert re.findall(r"Step (\d)", Page((tmp_path / "index.html").read_text()).text) == ["3", "2"]


def test_gallery_in_an_object_store():
    """The same calls write to a store without directories, appending or renaming."""
    fsspec.register_implementation("s3", Store, clobber=True)
    directory = epath.Path("s3://bucket/run/gallery")
    gallery.grow(directory, 5, samples())
    for frames in (3, 2):
        gallery.write_frames(directory / "frames", moving_square(frames))
    assert sorted(path.name for path in (directory / "frames").iterdir()) == ["f0000.png", "f0001.png"]
    page = Page(gallery.grow(directory, 6, samples()).read_text())
    assert re.findall(r"Step (\d)", page.text) == ["6", "5"]
    assert all((directory / reference).exists() for reference in page.references)
