"""What the commands say to wrong flags, and what they write for right ones. (Of a config: test_arguments.py.)"""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from test_trainer import tiny

import dit_video
from configs import base
from dit_video import generate, requests
from dit_video.canvas import Layout
from dit_video.codecs import make_codec
from dit_video.data.decode import check, decode
from dit_video.gallery import write_gif, write_mp4, write_png
from dit_video.sampling import uniform_levels
from dit_video.step import make_run
from dit_video.tasks import TASKS, start_rollout
from dit_video.text import make_text
from dit_video.trainer import parse_prompt

ROOT = pathlib.Path(__file__).resolve().parent.parent
# By its path: an import would put the module in the place of the function `dit_video.sample`.
SPEC = importlib.util.spec_from_file_location("sample_command", ROOT / "dit_video" / "sample.py")
SAMPLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SAMPLE)


def run(module, *given):
    """The command's exit code and output."""
    command = [sys.executable, "-m", f"dit_video.{module}", *given]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=200
    )
    return done.returncode, (done.stdout + done.stderr).rstrip("\n")


def test_a_config_that_cannot_run(tmp_path):
    """What only the trainer can know is one line too."""
    wrong = ["--config.data.rows=2", "--config.data.shards=2", "--config.optimizer.accumulate=4"]
    code, said = run("train", "--config=configs/shapes.py", f"--workdir={tmp_path / 'run'}", *wrong)
    assert (code, said) == (
        1,
        "ValueError: data.rows=2 do not split into optimizer.accumulate=4 parts over mesh.data=1 x "
        "mesh.fsdp=1 devices. Give a multiple of 4.",
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights of the tiny model, all drawn at random."""
    path, config = tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make_run(config).init, jax.random.key(0)).params
    generate.save_weights(path, jax.tree.map(lambda a: 0.1 * rng.standard_normal(a.shape), shapes), config, 7)
    return path


def sample_here(*given):
    """The sample command in this process."""
    with flagsaver.flagsaver():
        SAMPLE.main(flags.FLAGS(["sample", *given]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size=50x32"], r"width=50 cannot be cut into patches of 8 pixels. Nearest: 48 or 56\."),
        (["--size=48x3"], r"height=3 cannot be cut into patches of 8 pixels. Nearest: 8\."),
        (["--size=48"], r"size='48' is not of the form WIDTHxHEIGHT"),
        (["--frames=10"], r"frames=10 cannot be encoded.*Nearest: 9 or 13\."),
        (["--fps=-1"], r"fps=-1.0 is not a frame rate"),
        (["--fps=0.0001"], r"fps=0.0001 is not a frame rate. Give frames per second, 0.01 or more\."),
        (["--task=extend", "--video=missing.mp4", "--size=0x8"], r"width=0 cannot be cut .* Nearest: 8\."),
        (["--seed=1", "--seed=2", "--seed=3"], r"--seed was given 3 times for 2 requests: give it once, or 2 times\."),
        (["--task=extend", *["--video=a.mp4", "--new_frames=4"] * 3], "--prompt was given 2 times for 3 requests"),
        (["--size=16x16", "--size=8x8", "--size=24x8"], r"--size was given 3 times for 2 requests"),
        (["--image=x.png"], r"task=text takes no image; it belongs to animate"),
        (["--task=animate"], r"task=animate needs image: give --image"),
        (["--task=animate", "--image=missing.png"], r"missing\.png"),
        (["--task=extend"], r"task=extend needs video: give --video"),
        (["--task=extend", "--video=missing.mp4"], r"missing\.mp4"),
        (["--task=connect", "--video=a.mp4"], r"takes videos in pairs; --video was given 1 times"),
        (["--factor=2"], r"task=text takes no factor; it belongs to interpolate"),
        (
            ["--task=edit", "--video=a.mp4", "--frames=9"],
            r"task=edit takes no frames; it belongs to text, animate, loop",
        ),
        (["--task=timeline"], r"prompt='a' is not of the form 'SECONDS: prompt', such as '1.5: a red circle'"),
        (["--task=rollout", "--window=12"], r"window=12 must be 1 \+ 4k frames .*Nearest: 13"),
        (["--task=rollout", "--causal", "--window=9"], r"a causal roll-out takes no window: it sees the window"),
        (["--task=rollout", "--causal"], r"needs a model that trained with a window, and this one has model.window=0"),
        (["--causal"], r"task=text takes no causal; it belongs to rollout"),
        (["--requests=r.jsonl"], r"--prompt goes with no --requests: write it in the lines of r.jsonl"),
        (["--workdir=runs/x"], r"give one of --workdir and --weights"),
        (["circle"], r"'circle' is no flag: put the whole prompt in quotes"),
    ],
)
def test_wrong_sampling_flags(weights, tmp_path, given, message):
    """The value, the limit and the mend, in one line, before anything is sampled."""
    rest = [f"--weights={weights}", f"--out={tmp_path / 'out'}", "--prompt=a", "--prompt=b"]
    with pytest.raises(SystemExit, match=message) as error:
        sample_here(*rest, *given)
    assert "\n" not in error.value.code and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to(weights, tmp_path):
    """Is found before anything is sampled: even before a length that cannot be."""
    (tmp_path / "file").write_text("")
    for save in ("all", "latents"):
        given = [f"--weights={weights}", "--prompt=a", "--frames=10", f"--save={save}"]
        with pytest.raises(SystemExit, match=r"--out=\S+/out cannot be written to \(Not a directory\): give a folder"):
            sample_here(*given, f"--out={tmp_path / 'file' / 'out'}")


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .* holds no checkpoint\. Give a run's workdir"):
        sample_here(f"--workdir={tmp_path}", "--prompt=a")
    with pytest.raises(SystemExit, match=r"give one of --workdir and --weights"):
        sample_here("--prompt=a")
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .*missing.safetensors"):
        sample_here(f"--weights={tmp_path / 'missing.safetensors'}", "--prompt=a")
    (tmp_path / "theirs.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"theirs.pt holds no checkpoint\. Give .*file of weights, into which"):
        sample_here(f"--weights={tmp_path / 'theirs.pt'}", "--prompt=a")


def test_sample_command(weights, tmp_path):
    """A video leaves a PNG, a GIF, an mp4 and its frames, one frame a PNG alone; samples.json says how."""
    given = ["--prompt=a red circle", "--prompt=", "--size=16x24", "--frames=5", "--frames=1", "--fps=6"]
    given += ["--history=1.5"]
    code, said = run("sample", f"--weights={weights}", f"--out={tmp_path}", "--save=png", "--seed=3", *given)
    assert code == 0 and said.splitlines()[-1] == str(tmp_path / "index.html")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    video = {f"000-a-red-circle.{kind}" for kind in ("png", "gif", "mp4")}
    frames = {f"000-a-red-circle/f{t:04d}.png" for t in range(5)}
    assert files == video | frames | {"001.png", "index.html", "samples.json"}
    first, second = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert Image.open(tmp_path / "001.png").size == (16, 24)
    shown = [first[key] for key in ("prompt", "seed", "width", "height", "frames", "fps")]
    assert shown == ["a red circle", 3, 16, 24, 5, 6.0]
    assert (second["frames"], second["checkpoint_step"], second["weights"]) == (1, 7, str(weights))
    assert [first[key] for key in ("steps", "solver", "guidance", "history", "task")] == [2, "ab2", 3.0, 1.5, "text"]


def test_a_seed_gives_one_picture(weights, tmp_path):
    """The same flags give the same bytes; another seed another picture; --num takes the seeds that follow."""
    given = [f"--weights={weights}", "--prompt=a blue square", "--size=16x16", "--frames=1"]
    for name, more in {"a": ["--seed=4"], "b": ["--seed=4"], "c": ["--seed=5"], "d": ["--seed=4", "--num=2"]}.items():
        sample_here(*given, *more, f"--out={tmp_path / name}")
    picture = lambda name: (tmp_path / name).read_bytes()
    assert picture("a/000-a-blue-square.png") == picture("b/000-a-blue-square.png")
    assert picture("a/000-a-blue-square.png") != picture("c/000-a-blue-square.png")
    pixels = lambda name: np.asarray(Image.open(tmp_path / name), np.int32)
    assert abs(pixels("d/000-a-blue-square.png") - pixels("a/000-a-blue-square.png")).max() <= 1
    assert abs(pixels("d/001-a-blue-square.png") - pixels("c/000-a-blue-square.png")).max() <= 1


def test_animated_picture_stays_the_first_frame(weights, tmp_path):
    """The first frame is the picture to the bit, at its own size where that is whole patches."""
    picture = np.random.default_rng(0).integers(256, size=(16, 24, 3), dtype=np.uint8)
    write_png(tmp_path / "first.png", picture)
    sample_here(
        f"--weights={weights}", "--task=animate", f"--image={tmp_path / 'first.png'}", "--frames=5", f"--out={tmp_path}"
    )
    assert (np.asarray(Image.open(tmp_path / "000.png")) == picture).all()


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("--task=animate --image=a.png", [{"task": "animate", "image": "a.png"}]),
        (
            "--task=extend --video=a.mp4 --direction=backward --new_frames=16",
            [{"task": "extend", "video": "a.mp4", "direction": "backward", "new_frames": 16}],
        ),
        (
            "--task=connect --video=a.mp4 --video=b.mp4 --new_frames=16",
            [{"task": "connect", "video": ["a.mp4", "b.mp4"], "new_frames": 16}],
        ),
        ("--task=loop --video=a.mp4", [{"task": "loop", "video": "a.mp4"}]),
        ("--task=loop --prompt=p --num=3", [{"task": "loop", "prompt": "p", "num": 3}]),
        (
            "--task=paint --video=a.mp4 --mask=box:1,2,3,4 --size=64x64",
            [{"task": "paint", "video": "a.mp4", "mask": "box:1,2,3,4", "size": "64x64"}],
        ),
        ("--task=edit --video=a.mp4 --strength=0.6", [{"task": "edit", "video": "a.mp4", "strength": 0.6}]),
        ("--task=interpolate --video=a.mp4 --factor=4", [{"task": "interpolate", "video": "a.mp4", "factor": 4.0}]),
        ("--task=timeline --prompt=0:a --prompt=8:b", [{"task": "timeline", "prompt": ["0:a", "8:b"]}]),
        ("--task=rollout --frames=320 --seed=7", [{"task": "rollout", "frames": 320, "seed": 7}]),
        ("--task=rollout --causal", [{"task": "rollout", "causal": True}]),
        (
            "--task=extend --video=a.mp4 --video=b.mp4 --prompt=p --fps=8 --fps=12",
            [{"task": "extend", "video": v, "prompt": "p", "fps": fps} for v, fps in (("a.mp4", 8.0), ("b.mp4", 12.0))],
        ),
        (
            "--task=edit --video=a.mp4 --prompt=a --prompt=b --strength=0.3 --strength=0.9 --num=2",
            [
                {"task": "edit", "video": "a.mp4", "prompt": p, "strength": s, "num": 2}
                for p, s in (("a", 0.3), ("b", 0.9))
            ],
        ),
        ("--prompt=a --prompt=b --frames=5", [{"task": "text", "prompt": p, "frames": 5} for p in "ab"]),
    ],
)
def test_flags_are_lines_of_requests(given, lines):
    """What the flags ask for, in the form of --requests."""
    with flagsaver.flagsaver():
        flags.FLAGS(["sample", *given.split()])
        assert SAMPLE.fields_from_flags() == [{"num": 1} | line for line in lines]


@pytest.mark.parametrize("given", ["--task=loop", "--steps=2", "--guidance=2", "--history=1", "--out=x", "--causal"])
def test_flags_for_all_prompts_are_given_once(given):
    """absl would take the last without a word."""
    with flagsaver.flagsaver(), pytest.raises(flags.Error, match=f"{given.split('=')[0]}.*already defined"):
        flags.FLAGS(["sample", given, given])


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two moving GIFs of random pixels and 9 frames, 24x16 and 32x16, their first frames, and masks of 24x16."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for name, width in (("a", 24), ("b", 32)):
        video = np.repeat(rng.integers(200, size=(9, 16, width, 1), dtype=np.uint8), 3, 3)  # a palette's worth of greys
        write_gif(folder / f"{name}.gif", video, 8, 1)
        write_png(folder / f"{name}.png", video[0])
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[2:13, 8:15] = 255
    write_png(folder / "mask.png", mask)
    write_gif(folder / "c.gif", np.stack([mask] * 6 + [255 - mask] * 6), 8, 1)
    return folder


def frames_of(path, **changes):
    """A file's frames as they are decoded, TxYxXx3."""
    found = check(path)[0]
    how = {"time_T": found.stamps, "height": found.height, "width": found.width} | changes
    return decode(found, 0.0, **how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("connect a.gif b.gif", r"the videos are 24x16 and 32x16 .* both are resized to. Nearest: --size=24x16"),
        ("extend a.gif --size=20x16", "width=20 .*Nearest: 16 or 24"),
        ("extend a.gif --new_frames=0", "new_frames=0: give 1 frame at least"),
        ("extend a.gif --new_frames=2 --new_frames=3", "--new_frames was given 2 times for 1 request: give it once"),
        ("extend a.gif --fps=0", "fps=0.0 is not a frame rate"),
        ("paint a.gif", "painting needs a mask, or a size larger than the video's 24x16"),
        (
            "paint b.gif --size=16x8",
            "a size larger than the video's 32x16, such as --size=48x32: at 16x8 nothing is around",
        ),
        ("paint a.gif --mask=b.png", r"mask .*b.png is 32x16 and the video 24x16: give a mask of the video's size"),
        ("paint a.gif --mask=b.gif", r"mask .*b.gif is 32x16 and the video 24x16"),
        (
            "paint a.gif --mask=c.gif",
            r"c.gif has 2 frames in 1.5 s and the video 9 in 1.12 s: give 9, or as many seconds",
        ),
        ("paint a.gif --mask=box:0,0,9", "mask='box:0,0,9' is not of the form box:y0,x0,y1,x1"),
        ("paint a.gif --mask=box:4,4,20,30", r"video of 16x24 .* 9 frames. Nearest: box:4,4,16,24,0,9"),
        ("edit a.gif --strength=1.5", "strength=1.5 is no level to start from. Choose above 0, and 1 at most"),
        ("interpolate a.gif", "either a factor, frames out per frame in, or fps"),
        ("interpolate a.gif --factor=0", "factor=0 is no multiple"),
        ("interpolate a.gif --fps=29", "fps=29 of a video at 8 is 3.625 times .* up to 16. Nearest: fps=29.3333"),
        ("extend a.gif --direction=backward --context=2", "needs 4 known frames .*; context=2. Nearest: 4"),
        ("loop a.png", "new_frames=8 needs a video of 4 frames, in groups of 4 .*, and this has 1. Nearest: 4"),
        ("loop a.gif --frames=5", "frames=5 goes with no video: the video says how long"),
    ],
)
def test_wrong_media_flags(weights, media, tmp_path, given, message):
    """Both values and the nearest legal one, before anything is sampled."""
    task, *words = given.split()
    words = [word if word.startswith("--") else f"--video={media / word}" for word in words]
    words = [w.replace("--mask=", f"--mask={media}/") if "--mask" in w and "box" not in w else w for w in words]
    with pytest.raises(SystemExit, match=message) as error:
        sample_here(f"--weights={weights}", f"--out={tmp_path / 'out'}", f"--task={task}", *words)
    assert "\n" not in error.value.code and not (tmp_path / "out").exists()


def test_videos_are_read_as_long_as_they_last(tmp_path):
    """At any rate, the last frame and those that a GIF merged included; and their masks with them, whatever theirs."""
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.integers(8, 200, size=(13, 16, 24, 1), dtype=np.uint8), 3, 3)
    still = scenes[[0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4]]  # what write_gif merges
    stops = scenes[[0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6]]
    for name, video, fps in (("v", scenes, 8), ("still", still, 8), ("stops", stops, 8), ("slow", scenes[:2], 1)):
        write_gif(tmp_path / f"{name}.gif", video, fps, 1)
    write_mp4(tmp_path / "v.mp4", scenes, 8, 1)
    request = lambda task, **fields: requests.read(fields | {"task": task}, (8, 8))[0].request
    read = lambda name, **fields: request("extend", video=str(tmp_path / name), **fields).videos[0]
    np.testing.assert_array_equal(read("still.gif", fps=8), still)
    np.testing.assert_array_equal(read("stops.gif", fps=8), stops)
    np.testing.assert_array_equal(read("still.gif", fps=4), still[:12:2])
    np.testing.assert_array_equal(read("slow.gif", fps=8), scenes[:2].repeat(8, 0))
    np.testing.assert_array_equal(read("v.mp4", fps=24), read("v.mp4").repeat(3, 0))
    connected = request(
        "connect", video=[str(tmp_path / name) for name in ("v.gif", "slow.gif")]
    )  # at the first's rate
    assert [len(video) for video in connected.videos] == [13, 16] and connected.fps == 8
    # A single frame has no rate: the other's goes, whichever comes first.
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(tmp_path / "one.gif")
    for names in (("one.gif", "slow.gif"), ("slow.gif", "one.gif")):
        pair = request("connect", video=[str(tmp_path / name) for name in names])
        assert sorted(len(video) for video in pair.videos) == [1, 2] and pair.fps == 1
    # Near its own rate a video is read frame by frame.
    np.testing.assert_array_equal(read("v.gif", fps=8.05), scenes)

    white_T = np.isin(np.arange(13), [3, 4, 5, 6, 12])
    mask = np.zeros_like(scenes)
    mask[white_T, 2:9, 8:15] = 255
    write_gif(tmp_path / "mask.gif", mask, 8, 1)
    write_mp4(tmp_path / "mask.mp4", mask, 25, 1)
    for video, mask, fields, wanted_T in (
        ("v.mp4", "mask.gif", {}, white_T),
        ("v.gif", "mask.gif", {"fps": 4.0}, white_T[:12:2]),
        ("v.gif", "mask.mp4", {}, white_T),
        ("v.mp4", "mask.mp4", {"fps": 4.0}, white_T[:12:2]),
        ("still.gif", "mask.gif", {"fps": 8.0}, white_T),
    ):
        paths = {"video": str(tmp_path / video), "mask": str(tmp_path / mask)}
        np.testing.assert_array_equal(request("edit", **paths, **fields).mask_TxYxX[:, 5, 10], wanted_T)


def test_what_is_painted_around(media, shared):
    """The video at its own size, or at the largest that fits: only where the size is larger, or there is no mask."""
    clip = shared / "clips" / "videos" / "m3_deck_480x270_av1_10bit.mp4"
    if not clip.exists():
        pytest.skip(f"no {clip}")
    large, box = {"video": str(clip), "fps": 1.0}, {"mask": "box:0,0,9,9"}
    small = {"video": str(media / "b.gif")}
    for fields, width, height in (
        (small | {"size": "48x16"}, 32, 16), (small | box | {"size": "48x16"}, 32, 16), (small | box, 32, 16),
        (small | {"size": "24x24"}, 24, 16), (small | box | {"size": "24x24"}, 24, 16),
        (small | box | {"size": "24x16"}, 24, 16), (small | {"size": "16x16"}, 16, 8), (large | box, 480, 272),
        (large | {"size": "48x32"}, 48, 24), (large | box | {"size": "48x32"}, 48, 32),
    ):  # fmt: skip
        (asked,) = requests.read(fields | {"task": "paint"}, (8, 8))
        assert asked.request.videos[0].shape[1:3] == (height, width), fields
        assert asked.request.mask_TxYxX is None or asked.request.mask_TxYxX.shape[1:] == (height, width)


def test_a_mask_is_what_is_bright_and_opaque(media, tmp_path):
    """Whatever its colours: what is transparent is not white, though a picture of it is shown on white."""
    mask_YxXx4 = np.zeros((16, 24, 4), np.uint8)
    white_YxX = np.zeros((16, 24), bool)
    colours = {(255, 255, 255, 0): False, (255, 255, 255, 255): True, (100, 100, 100, 255): False,
               (150, 150, 150, 255): True, (0, 255, 0, 255): True, (0, 0, 255, 255): False}  # fmt: skip
    for x, (colour, white) in enumerate(colours.items()):
        mask_YxXx4[4:9, 4 * x : 4 * x + 4], white_YxX[4:9, 4 * x : 4 * x + 4] = colour, white
    Image.fromarray(mask_YxXx4).save(tmp_path / "mask.png")
    still, clear = Image.fromarray(mask_YxXx4), Image.new("RGBA", (24, 16))
    still.save(tmp_path / "mask.webp", save_all=True, append_images=[clear] * 8, duration=125, lossless=True)
    for name, times in (("mask.png", [1]), ("mask.webp", [1] + [0] * 8)):
        (asked,) = requests.read({"task": "paint", "video": str(media / "a.gif"), "mask": str(tmp_path / name)}, (8, 8))
        np.testing.assert_array_equal(asked.request.mask_TxYxX, [white_YxX & bool(time) for time in times])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "text", "promt": "a"}', "r.jsonl, line 3: task=text takes no promt; allowed: task, prompt"),
        ('{"task": "dream"}', "line 3: task='dream' is not known. Allowed: text, animate"),
        ('["text"]', "line 3: .* is no JSON object"),
        ('{"seed": 1, "task": "text", "seed": 1}', "line 3: seed is given 2 times: give it once"),
        ('{"task": "text"', "line 3: no JSON, Expecting ',' delimiter at column 16"),
        ('{"task": "text", "frames": "9"}', "line 3: frames='9' is no whole number"),
        ('{"task": ["text"]}', r"line 3: task=\['text'\] is no text"),
        ('{"task": "text", "guidance": "abc"}', "line 3: guidance='abc' is no finite number"),
        ('{"task": "text", "fps": Infinity}', "line 3: fps=inf is no finite number"),
        ('{"task": "text", "seed": true}', "line 3: seed=True is no whole number"),
        ('{"task": "animate", "image": 5}', "line 3: image=5 is no text"),
        ('{"task": "connect", "video": ["a.gif", 5]}', r"line 3: video=.* is no text"),
        ('{"task": "timeline", "prompt": ["inf: b"]}', "line 3: prompt='inf: b' is not of the form 'SECONDS: prompt'"),
        ('{"task": "text", "seed": -1}', "line 3: seed=-1 and num=1: give whole numbers, from 0 and from 1"),
        ('{"task": "timeline", "prompt": "0: a"}', "line 3: task=timeline takes a list of prompts: '0: a'"),
        ('{"task": "edit", "video": ["a.gif", "b.gif"]}', "line 3: task=edit takes 1 video; 2 were given"),
    ],
)
def test_wrong_lines_of_requests(weights, tmp_path, line, message):
    """The line's number, and what is wrong with it."""
    (tmp_path / "r.jsonl").write_text('{"prompt": "a"}\n\n' + line)
    with pytest.raises(SystemExit, match=message):
        sample_here(f"--weights={weights}", f"--out={tmp_path / 'out'}", f"--requests={tmp_path / 'r.jsonl'}")


def test_a_line_has_scales_of_its_own():
    (asked,) = requests.read({"prompt": "a", "guidance": 2, "history": 0.5}, (8, 8))
    assert (asked.request.guidance, asked.request.history) == (2, 0.5) and asked.fields["history"] == 0.5


def test_requests_that_ask_for_nothing(weights, tmp_path):
    (tmp_path / "r.jsonl").write_text("\n\n")
    with pytest.raises(SystemExit, match=r"r.jsonl asks for nothing: give a line such as"):
        sample_here(f"--weights={weights}", f"--out={tmp_path / 'out'}", f"--requests={tmp_path / 'r.jsonl'}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"frames": 10}, r"ValueError: \S+/r.jsonl, line 2: frames=10 cannot be encoded.*Nearest: 9 or 13\."),
        ({"size": "50x32"}, r"ValueError: \S+/r.jsonl, line 2: width=50 cannot be cut"),
        ({"task": "extend", "video": "missing.mp4"}, r"ValueError: \S+/r.jsonl, line 2: 'missing.mp4'"),
    ],
)
def test_wrong_requests_are_found_in_their_file(weights, tmp_path, line, message):
    """However far in the line was read; a line ends where JSON lines do, not where Unicode breaks a paragraph."""
    lines = [{"prompt": "a\u2028b\x85", "num": 3}, line]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    with pytest.raises(SystemExit, match=message):
        sample_here(f"--weights={weights}", f"--out={tmp_path / 'out'}", f"--requests={tmp_path / 'r.jsonl'}")


def test_readmes_tasks_are_laid_out_as_they_stand(monkeypatch):
    """Every command of the section on tasks, and its lines of requests, from the files that they name."""
    monkeypatch.chdir(ROOT)
    text, config = (ROOT / "README.md").read_text(), base.get_config()
    layout = Layout(make_codec(config.codec), tuple(config.model.patch), make_text(config.text).tokenise)
    fields = [json.loads(line) for line in re.search(r"<<'END'\n(.*?)END", text, re.DOTALL)[1].splitlines()]
    for line in re.findall(r"^python -m dit_video.sample (--.*--task=.*)$", text, re.MULTILINE):
        with flagsaver.flagsaver():
            flags.FLAGS(["sample", *shlex.split(line)])
            fields += SAMPLE.fields_from_flags()
    asked = [one for each in fields for one in requests.read(each, (8, 8))]
    kinds = {one.request.task for one in asked}
    assert kinds == set(requests.FIELDS) and len(asked) > 15
    for one in asked:
        if one.request.task == "rollout":
            start_rollout(one.request, layout)
        elif one.request.task != "loop" or one.request.videos:
            task = TASKS[one.request.task](one.request, layout, uniform_levels(2))
            assert task.level_Kxg.max() > 0


def test_every_task_from_lines_of_requests(weights, media, tmp_path, caplog):
    """Many tasks in one file; what is known comes back from PNGs bit for bit; samples.json makes all of it again."""
    a, b, mask = str(media / "a.gif"), str(media / "b.gif"), str(media / "mask.png")
    lines = [
        {"task": "animate", "image": str(media / "a.png"), "frames": 5, "prompt": "p"},
        {"task": "extend", "video": a, "new_frames": 3, "num": 2, "seed": 4},
        {"task": "extend", "video": a, "new_frames": 3, "direction": "backward"},
        {"task": "connect", "video": [a, b], "new_frames": 4, "size": "24x16"},
        {"task": "paint", "video": a, "mask": mask},
        {"task": "paint", "video": a, "mask": "box:2,8,13,15,0,9", "size": "40x16"},
        {"task": "edit", "video": a, "mask": mask, "strength": 0.5, "guidance": 1.0},
        {"task": "interpolate", "video": a, "factor": 2},
        {"task": "timeline", "prompt": ["0: p", "0.5: q"]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    how = [f"--weights={weights}", "--save=png", "--steps=1"]
    sample_here(*how, f"--requests={tmp_path / 'r.jsonl'}", f"--out={tmp_path / 'one'}")
    assert re.search(r"request 5, paint: the model knows 12 of 18 patches; .* 459 given pixels", caplog.text)
    made = json.loads((tmp_path / "one" / "samples.json").read_text())["samples"]
    assert [(s["task"], s["frames"], s["seed"]) for s in made] == [
        ("animate", 5, 0), ("extend", 12, 4), ("extend", 12, 5), ("extend", 12, 0), ("connect", 22, 0),
        ("paint", 9, 0), ("paint", 9, 0), ("edit", 9, 0), ("interpolate", 17, 0), ("timeline", 13, 0),
    ]  # fmt: skip
    assert (made[8]["fps"], made[8]["width"], made[6]["width"]) == (16.0, 24, 40)
    read = lambda folder, s: np.stack([np.asarray(Image.open(p)) for p in sorted((folder / s["name"]).glob("*.png"))])
    one = [read(tmp_path / "one", s) for s in made]
    video, known = frames_of(a), np.asarray(Image.open(mask))[..., 0] == 0
    for found, wanted in (
        (one[0][0], np.asarray(Image.open(media / "a.png"))), (one[1][:9], video), (one[2][:9], video),
        (one[3][-9:], video), (one[4][:9], video), (one[4][-9:], frames_of(b, height=16, width=24)),
        (one[5][:, known], video[:, known]), (one[6][:, :, 8:32][:, known], video[:, known]),
        (one[7][:, known], video[:, known]), (one[8][::2], video),
    ):  # fmt: skip
        np.testing.assert_array_equal(found, wanted)
    assert (one[1][9:] != one[2][9:]).any()

    (tmp_path / "again.jsonl").write_text("\n".join(json.dumps(s["request"]) for s in made))
    others = ["--guidance=7", "--history=2"]  # a request carries its own
    sample_here(*how, *others, f"--requests={tmp_path / 'again.jsonl'}", f"--out={tmp_path / 'two'}")
    for s, first in zip(json.loads((tmp_path / "two" / "samples.json").read_text())["samples"], one, strict=True):
        np.testing.assert_array_equal(read(tmp_path / "two", s), first)


def test_real_media(weights, shared, tmp_path):
    """Files of several codecs, resized and at another frame rate: identity is with the frames as they are decoded."""
    clips = shared / "clips"
    paths = [clips / "videos" / "m3_bbb_tree_176x144_mpeg4.mp4", clips / "videos" / "m3_bear_161x121_vp9.webm"]
    picture = next((clips / "images").glob("*.jpg"), None)
    if picture is None or not all(path.exists() for path in paths):
        pytest.skip(f"no real media at {clips}")
    lines = [
        {"task": "extend", "video": str(paths[0]), "size": "24x16", "fps": 8, "new_frames": 4},
        {"task": "loop", "video": str(paths[1]), "size": "24x16", "fps": 4, "new_frames": 4},
        {"task": "animate", "image": str(picture), "size": "16x24", "frames": 5},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sample_here(
        f"--weights={weights}", "--save=png", "--steps=1", f"--requests={tmp_path / 'r.jsonl'}", f"--out={tmp_path}"
    )
    made = json.loads((tmp_path / "samples.json").read_text())["samples"]
    for s, path, fps in zip(made, [*paths, picture], (8, 4, 1), strict=True):
        time_T = np.arange(round((check(path)[0].duration or 0) * fps) or 1) / fps + 0.005
        wanted = frames_of(path, time_T=time_T, height=s["height"], width=s["width"])
        found = [np.asarray(Image.open(p)) for p in sorted((tmp_path / s["name"]).glob("*.png"))]
        assert len(found) == len(wanted) + 4
        np.testing.assert_array_equal(found[: len(wanted)], wanted)


def test_gallery_prompts_are_read():
    request = parse_prompt("48x32x9@8: a red circle: moves", seed=2)
    assert (request.width, request.height, request.frames, request.fps, request.seed) == (48, 32, 9, 8.0, 2)
    assert request.prompt == "a red circle: moves"
    for wrong in ("a red circle", "48x32@8: a", "48x32x9: a", "48x32xnine@8: a"):
        with pytest.raises(ValueError, match=r"not of the form '48x32x9@8: a red circle'"):
            parse_prompt(wrong)


def test_the_importable_functions_are_those_of_the_commands():
    """What a notebook imports, and finds by completion: the very functions that the absl mains call."""
    for name, module in {"train": "trainer", "sample": "generate", "load": "generate", "Request": "tasks"}.items():
        found = {}
        exec(f"from dit_video import {name}", found)
        assert found[name] is getattr(importlib.import_module(f"dit_video.{module}"), name)
    assert set(dit_video.__all__) <= set(dir(dit_video))
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        exec("from dit_video import trian")


def test_configs_are_package_data():
    """setup.py ships the configs, and every one of them can be imported and resolved."""
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert {"base", "shapes", "clips", "dit"} <= names
    for name in names:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.steps > 0 and config.model.width > 0
    assert 'include=["dit_video", "dit_video.*", "configs"]' in (ROOT / "setup.py").read_text()
