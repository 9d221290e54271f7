"""Real and broken files: what is accepted, what is refused and why, and that what comes out is what the file shows."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures

import av
import numpy as np
import pytest
from PIL import Image

from dit_video import requests
from dit_video.data import clips, decode

ROOT = pathlib.Path(__file__).parent.parent
SHARED = pathlib.Path(os.environ.get("DIT_VIDEO_SHARED", ROOT.parent / "shared"))
CLIPS, BROKEN = SHARED / "clips", SHARED / "broken_media"
needs_media = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"needs the shared clips at {CLIPS} (DIT_VIDEO_SHARED)")


def manifest(folder):
    return (
        [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()] if folder.is_dir() else []
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "clips.jsonl"


@pytest.fixture(scope="module")
def source(cache):
    return clips.ClipsSource(CLIPS, max_tokens=512, max_side=256, seed=3, cache=cache)


@pytest.fixture(scope="module")
def by_name(source):
    return {os.path.relpath(media.path, CLIPS): media for media, _ in source.media}


def raw_frames(path):
    """(seconds, frame) straight from PyAV: the outside figure."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(float(frame.pts * stream.time_base), frame) for frame in container.decode(stream)]


def difference(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()


# What files say


@needs_media
def test_every_clip_is_accepted_and_agrees_with_the_manifest(source, by_name):
    entries = manifest(CLIPS)
    assert len(source) == len(entries) == 85
    assert [row["status"] for row in source.report] == ["ok"] * 85
    captions = {os.path.relpath(media.path, CLIPS): caption for media, caption in source.media}
    for entry in entries:
        name = entry["file"]
        media = by_name[name]
        assert captions[name] == entry["caption"]
        assert media.kind == entry["type"], name
        if entry.get("sar") in (None, "1"):
            assert (media.width, media.height) == (entry["display_width"], entry["display_height"]), name
        else:
            up, down = entry["sar"].split("/")
            assert (media.width, media.height) == (round(entry["width"] * int(up) / int(down)), entry["height"])
        assert len(media.stamps) == entry["frames"], name
        if media.kind == "video":
            assert media.rotation == entry["rotation"], name
            assert media.duration == pytest.approx(entry["duration"], abs=0.02), name
            assert media.first_pts == pytest.approx(entry["first_pts"], abs=1e-3), name
            assert not entry["fps"] or media.fps == pytest.approx(entry["fps"], rel=1e-3), name


@needs_media
def test_an_unchanged_folder_is_not_decoded_again(source, cache):
    start = time.thread_time()
    media, report = clips.scan(CLIPS, cache=cache)
    assert time.thread_time() - start < 1.0
    assert media == source.media
    assert report == source.report


ALLOWED = {
    "reject": {"rejected"},
    "reject_or_split": {"rejected"},
    "partial": {"partial"},
    "ok": {"ok"},
    "ok_or_reject": {"ok", "rejected"},
}


@needs_media
@pytest.mark.parametrize("name", ["cut_60pct_moov_at_start.mp4", "real_corrupt_mid_file.mp4"])
def test_what_of_a_named_file_cannot_be_used_is_said(name, caplog):
    """Asked for by name, a damaged video is used up to the damage, with a word."""
    media, report = decode.check(BROKEN / name)
    fields = {"task": "extend", "video": str(BROKEN / name), "size": "32x32"}
    (asked,) = requests.read(fields, (8, 8))
    assert len(asked.request.videos[0]) == len(media.stamps) < report["frames_promised"]
    assert f"{name}: only {len(media.stamps)} frames can be used ({report['reason']})" in caplog.text


@pytest.mark.parametrize("entry", manifest(BROKEN), ids=lambda entry: entry["file"])
def test_broken_files_are_judged_as_they_should_be(entry):
    start = time.thread_time()
    try:
        media, report = decode.check(BROKEN / entry["file"])
    except decode.MediaError as error:
        assert error.reason
        report = dict(status="rejected")
    else:  # what is accepted can be decoded, to its last frame
        video = decode.decode(media, 0.0, (0.0, media.stamps[-1]), 8, 16)
        assert video.shape == (2, 8, 16, 3)
    assert report["status"] in ALLOWED[entry["expect"]], report
    assert time.thread_time() - start < 30


@needs_media
def test_a_cut_file_gives_only_what_was_decoded():
    media, report = decode.check(BROKEN / "cut_60pct_moov_at_start.mp4")
    assert (report["frames_decoded"], report["frames_promised"], len(media.stamps)) == (90, 150, 90)
    assert "90 of 150" in report["reason"]
    media, report = decode.check(BROKEN / "real_corrupt_mid_file.mp4")
    assert (report["frames_decoded"], report["frames_promised"], len(media.stamps)) == (28, 50, 28)


@needs_media
def test_reasons_name_what_is_wrong():
    def reason(name):
        with pytest.raises(decode.MediaError) as error:
            decode.check(BROKEN / name)
        return error.value.reason

    assert "empty" in reason("zero_byte.mp4")
    assert "854x480 -> 640x426" in reason("midstream_resolution_change.ts")
    assert "850 of 864" in reason("real_encrypted_decodes_to_garbage.mp4")
    assert "no video stream" in reason("real_audio_only.mp4")
    assert "unknown codec" in reason("unknown_codec_tag.mp4")
    assert "5544" in reason("real_no_samples_5544_claimed.mp4")
    assert "rotation" in reason("real_no_timescale_bad_rotation.mp4")
    assert "30000" in reason("absurd_fps_30000.mp4")
    assert "17 of 3024 rows" in reason("img_real_shortened_4032x3024.jpg")


@needs_media
def test_limits_are_held_against_the_header():
    clip = CLIPS / "videos/mdn_flower_960x540_h264.mp4"
    for limit in (
        dict(max_pixels=500_000),
        dict(max_frames=149),
        dict(max_seconds=5),
        dict(max_fps=29),
        dict(max_volume=10**7),
    ):
        with pytest.raises(decode.MediaError, match=next(iter(limit))):
            decode.probe(clip, decode.Limits(**limit))


@needs_media
def test_no_file_may_take_long():
    """The clock runs out in the middle of 30 s of 720p: what was decoded until then is all there is, and is said."""
    start = time.thread_time()
    media, report = decode.check(CLIPS / "videos/mpy_bbb_30s_1280x720_vp8.webm", decode.Limits(timeout_s=0.1))
    assert time.thread_time() - start < 2
    assert report["status"] == "partial" and "0.1 s" in report["reason"]
    assert 0 < report["frames_decoded"] == len(media.stamps) < 720


def test_a_busy_machine_costs_no_frames(tmp_path):
    """What is used of a file follows from the work that it makes, not from how long others keep us waiting."""
    encode_greys(tmp_path / "small.mp4")
    limits = decode.Limits(timeout_s=0.5)
    media = decode.probe(tmp_path / "small.mp4", limits)
    with open(media.path, "rb") as file:
        frames = decode._frames(file, media, limits, time.thread_time() + limits.timeout_s)
        first = [next(frames)]
        time.sleep(2 * limits.timeout_s)
        assert len(first + list(frames)) == 12


@needs_media
def test_a_trimmed_clip_is_whole(tmp_path):
    """An edit list that shows half of the 241 stored frames breaks no promise."""
    data = bytearray((CLIPS / "videos/mpy_chaplin_640x360_h264.mp4").read_bytes())
    at = data.index(b"elst") + 12  # version 0, one entry: its duration
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 2).to_bytes(4, "big")
    (tmp_path / "trimmed.mp4").write_bytes(data)
    media, report = decode.check(tmp_path / "trimmed.mp4")
    assert (report["status"], report["frames_decoded"], len(media.stamps)) == ("ok", 121, 121)


# Folders


def encode_greys(path):
    """A real H.264 clip made here: 12 frames of 64x48 at 10 fps, each of one grey, 20 levels apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * index, np.uint8), "rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


@pytest.fixture
def small_clip(tmp_path):
    path = tmp_path / "small.mp4"
    encode_greys(path)
    return path


def test_odd_names_and_what_is_no_file(tmp_path, small_clip):
    folder = tmp_path / "folder"
    subprocess.run(
        ["sh", BROKEN / "make_special.sh", small_clip, folder], check=True
    ) if BROKEN.is_dir() else pytest.skip(f"needs {BROKEN}")
    shutil.copy(small_clip, os.fsencode(folder) + b"/caf\xe9_\xff\xfe clip.mp4")
    shutil.copy(small_clip, folder / "-i.mp4")
    (folder / "link_to_folder").symlink_to(folder)
    signal.alarm(20)  # ends the run where opening the pipe would wait for ever
    with pytest.raises(decode.MediaError, match="pipe"):
        decode.probe(folder / "pipe.mp4")
    media, report = clips.scan(folder, cache=tmp_path / "cache.jsonl")
    signal.alarm(0)
    status = {row["file"]: (row["status"], row["reason"]) for row in report}
    assert "link to nothing" in status["dangling_link.mp4"][1]
    assert "symbolic links" in status["loop_a.mp4"][1] and "symbolic links" in status["loop_b.mp4"][1]
    assert "pipe" in status["pipe.mp4"][1]
    assert "directory" in status["is_a_directory.mp4"][1]
    assert "not followed" in status["link_to_folder"][1]
    usable = {name for name, (state, _) in status.items() if state == "ok"}
    odd = {"new\nline.mp4", "a" * 251 + ".mp4", "caf\udce9_\udcff\udcfe clip.mp4", "-i.mp4"}
    assert odd <= usable and len(usable) == len(media)
    if os.geteuid():  # root reads everything
        assert "Permission" in status["noperm.mp4"][1] and "Permission" in status["noexec_dir"][1]
    assert json.loads(json.dumps(report)) == report
    assert clips.scan(folder, cache=tmp_path / "cache.jsonl") == (media, report)
    source = clips.ClipsSource(folder, max_tokens=64, min_side=16)
    assert all(source[index, 0] is not None for index in range(len(source)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_unreadable_files_are_refused_for_an_ordinary_user(small_clip):
    folder = small_clip.parent
    (folder / "closed").mkdir()
    shutil.copy(small_clip, folder / "secret.mp4")
    os.chmod(folder / "secret.mp4", 0)
    os.chmod(folder / "closed", 0)
    os.chmod(folder, 0o755)
    code = """
import json, os, sys
from dit_video.data import clips
os.chdir(sys.argv[1])  # while the parents can still be passed
clips.scan(".")  # and while everything that is imported late can be read
os.setuid(65534)
print(json.dumps([(row["file"], row["reason"]) for row in clips.scan(".")[1]]))
"""
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    reasons = dict(json.loads(run.stdout))
    assert "Permission" in reasons["secret.mp4"] and "Permission" in reasons["closed"]


def test_captions_come_from_the_manifest_then_from_text_files(tmp_path, small_clip):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.mp4", "c.mp4", ".hidden.mp4"):
        shutil.copy(small_clip, folder / name)
    for name, text in (("a.txt", "from a.txt"), ("c.txt", "caf\xe9\n"), ("README.md", "#"), ("notes.pdf", "words")):
        (folder / name).write_text(text)
    lines = [{"file": "a.mp4", "caption": "from the manifest"}, {"file": "gone.mp4", "caption": "x"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    media, report = clips.scan(folder)
    assert [caption for _, caption in media] == ["from the manifest", "caf\xe9", ""]
    assert {row["file"]: row["status"] for row in report} == {
        "a.mp4": "ok", "c.mp4": "ok", "gone.mp4": "rejected", "notes.pdf": "rejected", "sub/b.mp4": "ok"
    }  # fmt: skip
    assert "not media" in next(row["reason"] for row in report if row["file"] == "notes.pdf")
    (folder / "manifest.jsonl").write_text('{"file": "a.mp4"}\n{"caption": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        clips.scan(folder)


def test_playlists_do_not_reach_other_files(tmp_path, small_clip, monkeypatch):
    encode_greys(tmp_path / "part.ts")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\npart.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{small_clip.name}'\n")
    monkeypatch.chdir(tmp_path)
    for name in ("list.m3u8", "list.ffconcat"):
        with open(name, "rb") as file, av.open(file) as container:
            assert next(container.decode(video=0)).width == 64  # FFmpeg by itself follows them
        with pytest.raises(decode.MediaError):
            decode.check(name)


def test_a_file_that_changes_is_reported_and_disturbs_no_other(tmp_path, small_clip):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "empty").mkdir()
    for name in "abcde":
        shutil.copy(small_clip, folder / f"{name}.mp4")
    source = clips.ClipsSource(folder, max_tokens=64, min_side=16)
    before = [source[index, 5] for index in range(5)]
    (folder / "b.mp4").unlink()
    data = bytearray((folder / "c.mp4").read_bytes())
    data[len(data) // 3 :] = b"\0" * (len(data) - len(data) // 3)
    (folder / "c.mp4").write_bytes(data)  # as long as before
    with open(folder / "d.mp4", "ab") as file:
        file.write(b"more")
    after = [source[index, 5] for index in range(5)]
    assert after[1] is after[2] is after[3] is None
    assert [pathlib.Path(error["file"]).name for error in source.errors] == ["b.mp4", "c.mp4", "d.mp4"]
    assert all(error["reason"] and error["epoch"] == 5 for error in source.errors)
    for index in (0, 4):
        assert np.array_equal(before[index].video_TxYxXx3, after[index].video_TxYxXx3)
    with pytest.raises(decode.MediaError, match="b.mp4"):
        source.clip(1, 5)
    with pytest.raises(ValueError, match="no usable clip"):
        clips.ClipsSource(tmp_path / "empty", max_tokens=64)


# What frames show


@needs_media
def test_time_stamps_are_the_files_own(by_name):
    for name in ("mpy_dog_stove_rot180_vfr.mp4", "m3_sunrise_city_vfr_h264.mp4", "m3_bbb_first_pts_10s.mp4"):
        seconds = np.array([second for second, _ in raw_frames(CLIPS / "videos" / name)])
        media = by_name[f"videos/{name}"]
        np.testing.assert_allclose(media.stamps, seconds - seconds[0], atol=1e-9)
        assert media.first_pts == pytest.approx(seconds[0])


def test_each_time_shows_the_last_frame_that_is_not_later(small_clip):
    media, _ = decode.check(small_clip)
    np.testing.assert_allclose(media.stamps, np.arange(12) / 10, atol=1e-9)
    time_T = np.array([0.0, 0.099, 0.1, 0.25, 0.25, 0.9, 5.0])
    for known in (media, decode.probe(small_clip)):  # with its stamps, and before they are known
        for start_s, first in ((0.0, 0), (0.3, 3)):
            video = decode.decode(known, start_s, time_T, 48, 64)
            index = np.minimum(first + np.array([0, 0, 1, 2, 2, 9, 50]), 11)
            np.testing.assert_allclose(video.mean((1, 2, 3)), 20 * index, atol=2)
    with pytest.raises(ValueError, match="ascending"):
        decode.decode(media, 0.0, (0.2, 0.1), 48, 64)


@needs_media
@pytest.mark.parametrize(
    "name", ["m3_keyboard_rot90_hevc.mp4", "mpy_dog_stove_rot180_vfr.mp4", "m3_selfie_1080x720_h264.mp4"]
)
def test_clips_stand_upright(by_name, name):
    _, frame = raw_frames(CLIPS / "videos" / name)[2]
    upright = frame.to_image().rotate(frame.rotation, expand=True)
    media = by_name[f"videos/{name}"]
    assert upright.size == (media.width, media.height)
    size = (media.height // 4, media.width // 4)
    video = decode.decode(media, media.stamps[2], (0.0,), *size)
    assert difference(video[0], upright.resize(size[::-1], Image.Resampling.BICUBIC)) < 2.5


@needs_media
def test_a_mirrored_display_matrix_is_undone(by_name):
    """The matrix of this file is a transposition, of which `frame.rotation` tells only half."""
    name = "videos/m3_selfie_rot_reflect_h264.mp4"
    upright = raw_frames(CLIPS / name)[0][1].to_image().transpose(Image.Transpose.TRANSPOSE)
    video = decode.decode(by_name[name], 0.0, (0.0,), 1080, 720)
    assert difference(video[0], upright) < 2.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8)).resize((64, 96))
    methods = Image.Transpose
    # How a camera held that way stores the picture, from the EXIF standard's table.
    stored = {
        1: picture,
        2: picture.transpose(methods.FLIP_LEFT_RIGHT),
        3: picture.transpose(methods.ROTATE_180),
        4: picture.transpose(methods.FLIP_TOP_BOTTOM),
        5: picture.transpose(methods.TRANSPOSE),
        6: picture.transpose(methods.ROTATE_90),
        7: picture.transpose(methods.TRANSVERSE),
        8: picture.transpose(methods.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    media, _ = decode.check(tmp_path / "picture.png")
    assert (media.width, media.height) == (64, 96)
    assert np.array_equal(decode.decode(media, 0.0, (0.0,), 96, 64)[0], np.asarray(picture))


def test_pictures_of_every_mode_come_out_in_rgb(tmp_path):
    ramp_YxX = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected_YxX = ramp_YxX / 257
    grey = Image.fromarray((ramp_YxX // 257).astype(np.uint8))
    half = Image.merge("RGBA", (grey, grey, grey, Image.new("L", grey.size, 128)))
    over_white_YxX = expected_YxX * 128 / 255 + 255 * 127 / 255
    for name, picture, want_YxX, tolerance in (
        ("deep.png", Image.fromarray(ramp_YxX), expected_YxX, 1),
        ("deep.tiff", Image.fromarray(ramp_YxX), expected_YxX, 1),
        ("grey.png", grey, expected_YxX, 1),
        ("palette.png", grey.convert("P"), expected_YxX, 1),
        ("cmyk.jpg", grey.convert("RGB").convert("CMYK"), expected_YxX, 6),
        ("half.png", half, over_white_YxX, 1.5),
        ("clear.gif", Image.new("RGBA", (64, 64), (200, 0, 0, 0)), np.full((64, 64), 255), 1),
        ("bilevel.png", grey.point(lambda level: 255 * (level > 99)).convert("1"), 255 * (expected_YxX >= 100), 1),
    ):
        path = tmp_path / name
        picture.save(path)
        media, _ = decode.check(path)
        assert media.kind == "image"
        video = decode.decode(media, 0.0, (0.0, 1.0), 64, 64)
        assert video.shape == (2, 64, 64, 3) and video.dtype == np.uint8
        assert np.abs(video[1] - want_YxX[..., None]).max() <= tolerance, name
        if name == "clear.gif":
            assert decode.decode(media, 0.0, (0.0,), 64, 64, ground=70).tolist() == np.full((1, 64, 64, 3), 70).tolist()


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png"])
def test_animations_are_videos_with_their_own_stamps(tmp_path, name):
    frames = [Image.new("RGB", (32, 24), (60 * index, 0, 255 - 60 * index)) for index in range(4)]
    durations = [100, 50, 200, 100]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    media, report = decode.check(tmp_path / name)
    assert (media.kind, report["status"]) == ("video", "ok")
    np.testing.assert_allclose(media.stamps, [0, 0.1, 0.15, 0.35], atol=1e-6)
    assert media.duration == pytest.approx(0.45, abs=0.051)  # FFmpeg does not tell a GIF's last duration
    video = decode.decode(media, 0.12, (0.0, 0.1, 0.3), 24, 32)
    np.testing.assert_allclose(video[:, 12, 16, 0], [60, 120, 180], atol=1)


@needs_media
def test_colours_follow_the_tagged_matrix(tmp_path):
    """BT.709 limited-range YUV to RGB by the standard's own figures; swscale left alone would take BT.601."""
    path = tmp_path / "green.mp4"
    y, cb, cr = 173, 42, 26  # 100% green in BT.709, 8 bits: Y 173, Cb 42, Cr 26
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=10, options={"crf": "0", "colorspace": "bt709", "color_range": "tv"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        planes = np.concatenate([np.full(64 * 48, y), np.full(32 * 24, cb), np.full(32 * 24, cr)])
        frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8).reshape(72, 64), "yuv420p")
        frame.colorspace, frame.color_range = 1, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = decode.decode(decode.check(path)[0], 0.0, (0.0,), 48, 64)
    np.testing.assert_allclose(video[0, 24, 32], [0, 255, 0], atol=3)


@needs_media
def test_shrinking_is_antialiased(by_name):
    """swscale and Pillow agree on a clip at an eighth of its size: no aliasing, no shift."""
    name = "videos/m3_bbb_squirrels_960x540_60fps_vp9.webm"
    raw = raw_frames(CLIPS / name)[30][1].to_image()
    video = decode.decode(by_name[name], by_name[name].stamps[30], (0.0,), 64, 120)
    reference = raw.resize((120, 64), Image.Resampling.BICUBIC)
    assert difference(video[0], reference) < 1.5
    assert difference(video[0], raw.resize((120, 64), Image.Resampling.NEAREST)) > 3


def assert_seeking_changes_nothing(media):
    stamps = media.stamps[:: max(1, len(media.stamps) // 7)]
    whole = decode.decode(media, 0.0, stamps, 32, 48)
    for known in (media, dataclasses.replace(media, stamps=())):
        for index in (len(stamps) // 2, len(stamps) - 1):
            part = decode.decode(known, stamps[index], (0.0,), 32, 48)
            assert np.array_equal(part[0], whole[index]), media.path


@needs_media
@pytest.mark.parametrize(
    "name",
    [
        "m3_clock_518x488_h264.mp4",
        "m3_roof_640x360_preroll.mp4",  # its only key frame is one that is not shown
        "m3_bbb_clouds_320x180_vvc.mp4",  # a seek lands behind the time asked for
        "m3_selfie_640x426_mpeg2.mpg",  # likewise
        "mpy_pigs_314x273.gif",
    ],
)
def test_seeking_changes_nothing(by_name, name):
    assert_seeking_changes_nothing(by_name[f"videos/{name}"])


@needs_media
def test_concealed_damage_is_never_shown(tmp_path, by_name):
    """The scan saw a good file; before decoding, 1600 of its bytes change, at the same length."""
    media = by_name["videos/tc_nasa_webb_320x180_h264.mp4"]
    path = shutil.copy(BROKEN / "bitflips_mdat.mp4", tmp_path / "clip.mp4")
    damaged = dataclasses.replace(media, path=str(path))
    assert decode.decode(damaged, 0.0, (media.stamps[2],), 18, 32).shape == (1, 18, 32, 3)
    for index in (0, 4, 6, 8):  # the decoder flags these
        with pytest.raises(decode.MediaError, match="damaged"):
            decode.decode(damaged, 0.0, (media.stamps[index],), 18, 32)


@pytest.mark.slow
@needs_media
def test_seeking_changes_nothing_in_any_clip(source):
    for media, _ in source.media:
        assert_seeking_changes_nothing(media)


# Windows and sizes


def test_sizes_keep_the_aspect_ratio_within_a_patch():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(8000), 2)))
        patch = tuple(rng.choice([4, 8, 16], 2).tolist())
        max_patches, min_side, max_side = (
            int(rng.integers(1, 3000)),
            int(rng.integers(1, 200)),
            int(rng.integers(16, 2000)),
        )
        for y, x in clips.legal_sizes(height, width, patch, min_side, max_side, max_patches):
            assert y % patch[0] == 0 and x % patch[1] == 0
            assert 0 < (y // patch[0]) * (x // patch[1]) <= max_patches
            assert y <= max(height, patch[0]) and x <= max(width, patch[1]) and max(y, x) <= max_side
            # One of the sides is what the other and the aspect ratio ask for, up to less than a patch.
            assert abs(y - x * height / width) < patch[0] or abs(x - y * width / height) < patch[1]
    sizes = clips.legal_sizes(480, 640, (8, 8), 64, 320, 2000)
    assert sizes[0] == (64, 80) and sizes[-1] == (240, 320) and len(sizes) > 25


@needs_media
@pytest.mark.parametrize("fps,strides", [(None, (1, 2, 3)), ((4.0, 8.0, 12.5), (1,))])
def test_layouts_fit_the_budget_and_the_file(cache, fps, strides):
    budgets = dict(max_tokens=300, min_side=48, max_side=200, max_frames=33, fps=fps, strides=strides, cache=cache)
    source = clips.ClipsSource(CLIPS, seed=1, **budgets)
    seen = set()
    for index in range(len(source)):
        media, caption = source.media[index]
        for epoch in range(8):
            layout = source.layout(index, epoch)
            seen.add(layout.uid)
            latents = 1 + (layout.frames - 1) // 4
            assert (layout.frames - 1) % 4 == 0 and layout.frames <= 33
            assert latents * layout.height * layout.width / 64 <= 300
            assert layout.height % 8 == layout.width % 8 == 0 and max(layout.height, layout.width) <= 200
            assert layout.height <= media.height and layout.width <= media.width
            assert layout.caption == caption
            assert layout.start_s >= 0 and layout.start_s + layout.time_T[-1] <= media.stamps[-1] + 1e-6
            assert layout.time_T[0] == 0 and np.all(np.diff(layout.time_T) > 0)
            if len(media.stamps) < 5:
                assert layout.frames == 1
            if fps is None:
                shown = layout.start_s + np.array(layout.time_T)
                assert np.abs(np.subtract.outer(shown, media.stamps)).min(1).max() < 1e-9
            elif layout.frames > 1:
                rate = 1 / np.diff(layout.time_T).mean()
                assert min(abs(rate - f) for f in (*fps, media.fps)) < 1e-6 and rate < media.fps + 1e-6
    assert len(seen) == 8 * len(source)


@needs_media
def test_windows_are_named_by_seed_epoch_and_index_alone(source, cache):
    other = clips.ClipsSource(CLIPS, max_tokens=512, max_side=256, seed=4, cache=cache)
    again = clips.ClipsSource(CLIPS, max_tokens=512, max_side=256, seed=3, cache=cache)
    videos = [index for index, (media, _) in enumerate(source.media) if len(media.stamps) > 30]
    backwards = {index: again.layout(index, 7) for index in reversed(videos)}
    assert all(source.layout(index, 7) == backwards[index] for index in videos)
    moved = [
        sum(
            (a.layout(i, e).start_s, a.layout(i, e).time_T) != (source.layout(i, 7).start_s, source.layout(i, 7).time_T)
            for i in videos
        )
        for a, e in ((source, 8), (other, 7))
    ]
    assert min(moved) > 0.9 * len(videos)
    # Nor do two files share a draw: over the epochs, one's places in time tell nothing of the other's.
    pair = [i for i, (media, _) in enumerate(source.media) if "mdn_flower_960" in media.path]
    starts = np.array([[source.layout(i, epoch).start_s for epoch in range(100)] for i in pair])
    assert abs(np.corrcoef(starts)[0, 1]) < 0.5
    index = next(i for i, (media, _) in enumerate(source.media) if "bottles" in media.path)
    media = source.media[index][0]
    places = [
        source.layout(index, e).start_s / (media.stamps[-1] - source.layout(index, e).time_T[-1]) for e in range(400)
    ]
    counts = np.histogram(places, 4, (0, 1))[0]
    assert np.abs(counts - 100).max() < 45  # 5 standard deviations of a uniform draw


@needs_media
def test_clips_are_what_their_layouts_say(source):
    quick = (
        "images/mdn_woodland_strip",
        "images/mdn_puppy",
        "m3_bear",
        "mpy_pigs",
        "derived_webb",
        "bus_64",
        "sk_text",
    )
    chosen = [i for i, (media, _) in enumerate(source.media) if any(part in media.path for part in quick)]
    assert len(chosen) == len(quick)
    for index in chosen:
        layout, clip = source.layout(index, 2), source[index, 2]
        assert clip.video_TxYxXx3.shape == (layout.frames, layout.height, layout.width, 3)
        assert clip.video_TxYxXx3.dtype == np.uint8 and clip.video_TxYxXx3.flags.c_contiguous
        assert clip.time_T.dtype == np.float32 and clip.time_T.tolist() == np.float32(layout.time_T).tolist()
        assert (clip.caption, clip.uid) == (layout.caption, layout.uid) and 0 <= clip.uid < 2**32
        assert np.array_equal(clip.video_TxYxXx3, source[index, 2].video_TxYxXx3)
    assert source.errors == []


@pytest.mark.slow
@needs_media
def test_every_clip_decodes(source):
    for index in range(len(source)):
        assert source[index, 0].video_TxYxXx3.shape[0] == source.layout(index, 0).frames


def test_a_strip_too_thin_for_the_budget_is_cut(tmp_path):
    ramp_X = np.linspace(0, 255, 3000).astype(np.uint8)
    Image.fromarray(np.repeat(ramp_X[None], 16, axis=0)).save(tmp_path / "strip.png")
    source = clips.ClipsSource(tmp_path, max_tokens=10, max_side=512)
    corners = set()
    for epoch in range(20):
        layout, clip = source.layout(0, epoch), source[0, epoch]
        corners.add(layout.corner[1])
        assert (layout.height, layout.width, layout.scaled) == (8, 80, (8, 1500))
        left = layout.corner[1] / 1500 * 255
        assert clip.video_TxYxXx3[0, 4, 0, 0] == pytest.approx(left, abs=2)
        assert clip.video_TxYxXx3[0, 4, -1, 0] == pytest.approx(left + 80 / 1500 * 255, abs=2)
    assert len(corners) > 10


# Faults


@needs_media
def test_a_bomb_costs_little_memory():
    """A window from the middle of six minutes of 4K (540 GB in RGB), with every limit out of the way."""
    code = """
import resource, sys
from dit_video.data import decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
try:
    decode.check(sys.argv[1])
except decode.MediaError as error:
    assert "max_volume" in error.reason
else:
    raise AssertionError("the bomb was accepted")
limits = decode.Limits(max_volume=10**15)
media = decode.probe(sys.argv[1], limits)
video = decode.decode(media, 200.0, [0.0, 0.1, 0.2], 88, 160, limits)
print(video.shape, peak() - before)
"""
    command = [sys.executable, "-c", code, BROKEN / "real_bomb_4k60_6min.mp4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("(3, 88, 160, 3)") and float(run.stdout.split()[-1]) < 512


def survive_mutations(count, tmp_path):
    names = ["videos/m3_bbb_tree_176x144_h263.3gp", "videos/m3_bear_161x121_vp9.webm", "videos/mpy_pigs_314x273.gif",
             "videos/m3_deck_480x270_av1_10bit.mp4", "videos/m3_selfie_640x426_mpeg2.mpg", "images/mdn_fly_280x210.jpg",
             "images/mdn_beetle_rgba_280x181.png", "videos/m3_floor_320x240_slowmo.mp4"]  # fmt: skip
    rng = random.Random(count)
    for number in range(count):
        data = bytearray((CLIPS / names[number % len(names)]).read_bytes())
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(rng.choice([64, 2048, len(data)]))] = rng.randrange(256)
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        start = time.thread_time()
        try:
            media, _ = decode.check(path)
            decode.decode(media, 0.0, media.stamps[-2:], 16, 16)
        except decode.MediaError as error:
            assert error.reason
        assert time.thread_time() - start < 30


@needs_media
def test_mutated_files_end_no_run(tmp_path):
    survive_mutations(40, tmp_path)


@pytest.mark.slow
@needs_media
def test_many_mutated_files_end_no_run(tmp_path):
    survive_mutations(500, tmp_path)


# What is kept of a scan


def test_what_was_scanned_is_recalled_without_the_files(tmp_path):
    """The list that another process has scanned, to the last stamp and caption, while no file can be read any more."""
    folder, kept, rng = tmp_path / "clips", tmp_path / "cache.jsonl", np.random.default_rng(0)
    folder.mkdir()
    for name in ("b", "a", "c"):
        Image.fromarray(rng.integers(256, size=(16, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    (folder / "broken.mp4").write_bytes(b"no video")
    media, report = clips.scan(folder, cache=kept)
    assert [row["status"] for row in report] == ["ok", "ok", "rejected", "ok"]
    for path in folder.glob("*.png"):
        path.unlink()
    assert clips.recall(folder, kept) == media and len(media) == 3
    again = clips.ClipsSource(folder, max_tokens=64, min_side=8, cache=kept, scanned=True)
    assert again.media == media and again.layout(1, 0).caption == "picture b"


def test_reports_written_at_once_do_not_meet(tmp_path):
    """Of hosts whose processes have one id, which threads of one process are: a report is there whole, and no rest."""
    rows = [[{"file": f"{i}-{j}"} for j in range(200)] for i in range(8)]
    with futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda part: clips.write_report(part, tmp_path / "report.jsonl"), rows))
    found = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert found in rows and [path.name for path in tmp_path.iterdir()] == ["report.jsonl"]
