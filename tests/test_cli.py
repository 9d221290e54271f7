"""What the commands say to wrong flags, how soon, and what they write for right ones."""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from test_trainer import tiny

from dit_video import generate
from dit_video.gallery import write_png
from dit_video.step import make_run
from dit_video.trainer import parse_prompt

ROOT = pathlib.Path(__file__).resolve().parent.parent
# By its path: an import would put the module in the place of the function `dit_video.sample`.
SPEC = importlib.util.spec_from_file_location("sample_command", ROOT / "dit_video" / "sample.py")
SAMPLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SAMPLE)


def run(module, *given):
    """The command's exit code and output, and whether it imported jax."""
    command = [sys.executable, "-X", "importtime", "-m", f"dit_video.{module}", *given]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=200
    )
    lines = (done.stdout + done.stderr).splitlines()
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, said, any(line.endswith("| jax") for line in lines)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--config.optimizer.lrr=1"], ["no such key", "'lrr'", 'Did you mean "lr"']),
        (["--config.optimzer.lr=1"], ["no such key", "'optimzer'", 'Did you mean "optimizer"']),
        (["--config.stpes=1"], ["no such key", "'stpes'", 'Did you mean "steps"']),
        (["--config.steps=abc"], ["--config.steps=abc", "invalid literal"]),
        (["--config.optimizer.lr=fast"], ["--config.optimizer.lr=fast", "could not convert string to float"]),
        (["--workdri=x"], ["Unknown command line flag 'workdri'", "Did you mean: workdir"]),
        (["config.steps=3"], ["'config.steps=3' is no flag", "--config.steps=100"]),
        (["--config=configs/shape.py"], ["configs/shape.py", "No such file or directory"]),
    ],
)
def test_wrong_training_flags(tmp_path, given, words):
    """One clear line, before jax is loaded, and nothing is begun."""
    began = time.monotonic()
    workdir = f"--workdir={tmp_path / 'run'}"
    code, said, loaded_jax = run("train", "--config=configs/shapes.py", workdir, *given)
    assert time.monotonic() - began < 10
    assert code in (1, 2) and not loaded_jax and "Traceback" not in said
    assert not [word for word in words if word not in said], said
    assert len(said.splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_a_config_that_cannot_run(tmp_path):
    """What only the trainer can know is one line too."""
    wrong = ["--config.data.rows=2", "--config.data.shards=2", "--config.optimizer.accumulate=4"]
    code, said, _ = run("train", "--config=configs/shapes.py", f"--workdir={tmp_path / 'run'}", *wrong)
    assert (code, said) == (
        1,
        "ValueError: data.rows=2 do not split into optimizer.accumulate=4 parts over 1 devices.",
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
        (["--size=48"], r"--size='48' is not of the form WIDTHxHEIGHT"),
        (["--frames=10"], r"frames=10 cannot be encoded.*Nearest: 9 or 13\."),
        (["--fps=-1"], r"fps=-1.0 is not a frame rate"),
        (["--seed=1", "--seed=2", "--seed=3"], r"--seed was given 3 times for 2 prompts: give it once, or 2 times\."),
        (["--size=16x16", "--size=8x8", "--size=24x8"], r"--size was given 3 times for 2 prompts"),
        (["--image=x.png"], r"--task=animate takes an --image, and no other task does"),
        (["--task=animate"], r"--task=animate takes an --image"),
        (["--task=animate", "--image=missing.png"], r"missing\.png"),
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


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .* holds no checkpoint\. Give a run's workdir"):
        sample_here(f"--workdir={tmp_path}", "--prompt=a")
    with pytest.raises(SystemExit, match=r"give one of --workdir and --weights"):
        sample_here("--prompt=a")
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .*missing.safetensors"):
        sample_here(f"--weights={tmp_path / 'missing.safetensors'}", "--prompt=a")


def test_sample_command(weights, tmp_path):
    """A video leaves a PNG, a GIF, an mp4 and its frames, one frame a PNG alone; samples.json says how."""
    given = ["--prompt=a red circle", "--prompt=", "--size=16x24", "--frames=5", "--frames=1", "--fps=6"]
    code, said, _ = run("sample", f"--weights={weights}", f"--out={tmp_path}", "--save=png", "--seed=3", *given)
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
    assert (first["steps"], first["solver"], first["guidance"], first["task"]) == (2, "ab2", 3.0, "text")


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


def test_gallery_prompts_are_read():
    request = parse_prompt("48x32x9@8: a red circle: moves", seed=2)
    assert (request.width, request.height, request.frames, request.fps, request.seed) == (48, 32, 9, 8.0, 2)
    assert request.prompt == "a red circle: moves"
    for wrong in ("a red circle", "48x32@8: a", "48x32x9: a", "48x32xnine@8: a"):
        with pytest.raises(ValueError, match=r"not of the form '48x32x9@8: a red circle'"):
            parse_prompt(wrong)


def test_configs_are_package_data():
    """setup.py ships the configs, and every one of them can be imported and resolved."""
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert {"base", "shapes", "clips", "dit"} <= names
    for name in names:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.steps > 0 and config.model.width > 0
    assert 'include=["dit_video", "dit_video.*", "configs"]' in (ROOT / "setup.py").read_text()
