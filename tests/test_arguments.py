"""A wrong flag or value is refused in one line, with what it may be, before jax is loaded; all that is right is not."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_layers import ROOT

from configs import base, clips, dit, latte, scale, shapes, sit, wan
from dit_video.allowed import INTERVALS, WORDS, check_config

TRAIN = ["--config=configs/shapes.py", "--workdir=nowhere"]
# What is typed, and what must be said to it.
WRONG = {
    "--config.optimizer.lrr=1": ["no such key", "'lrr'", 'Did you mean "lr"'],
    "--config.optimzer.lr=1": ["no such key", "'optimzer'", 'Did you mean "optimizer"'],
    "--config.stpes=1": ["no such key", "'stpes'", 'Did you mean "steps"'],
    "--config.steps=abc": ["--config.steps=abc", "invalid literal"],
    "--config.optimizer.lr=fast": ["--config.optimizer.lr=fast", "could not convert string to float"],
    "--workdri=x": ["Unknown command line flag 'workdri'", "Did you mean: workdir"],
    "config.steps=3": ["'config.steps=3' is no flag", "--config.steps=100"],
    "--config=configs/shape.py": ["configs/shape.py", "No such file or directory"],
    "--config=configs/dit.py:M/2": ["form 'M/2' is not known", "S/2, S/4, S/8, B/2"],
    "--config=configs/shapes.py:qick": ["form 'qick' is not known", "long, quick, tasks."],
    "--config.model.text=croos": ["model.text='croos' is not known. Did you mean 'cross'? Allowed: 'none', 'pooled'"],
    "--config.model.modulation=shred": ["model.modulation='shred'", "Did you mean 'shared'?"],
    "--config.model.level_direction=nois": ["model.level_direction='nois'", "Did you mean 'noise'?"],
    "--config.model.remat=ful": ["model.remat='ful'", "Did you mean 'full'?"],
    "--config.model.attention_pattern=('al',)": ["model.attention_pattern=('al',)", "Did you mean 'all'?"],
    "--config.model.dtype=float23": ["model.dtype='float23'", "Did you mean 'float32'?"],
    "--config.model.predict=velocity": ["model.predict='velocity' is not known. Allowed: 'x', 'v', 'e', 'ddpm'."],
    "--config.data.group_by=frames": ["data.group_by='frames'", "Did you mean 'frame'?"],
    "--config.data.kind=shape": ["data.kind='shape'", "Did you mean 'shapes'?"],
    "--config.codec.kind=pixel": ["codec.kind='pixel'", "Did you mean 'pixels'?"],
    "--config.text.kind=word": ["text.kind='word'", "Did you mean 'words'?"],
    "--config.optimizer.kind=adam": ["optimizer.kind='adam'", "Did you mean 'adamw'?"],
    "--config.mesh.exchange=rign": ["mesh.exchange='rign'", "Did you mean 'ring'?"],
    "--config.sample.solver=eulr": ["sample.solver='eulr'", "Did you mean 'euler'?"],
    "--config.flow.distribution=logitnormal": ["flow.distribution='logitnormal'", "Did you mean 'logit_normal'?"],
    "--config.lora.targets=('q','mlp')": ["lora.targets=('q', 'mlp')", "Allowed: 'q', 'k', 'v', 'o'"],
    "--config.optimizer.ema=1.5": ["optimizer.ema=1.5 must lie in [0, 1)."],
    "--config.optimizer.lr=nan": ["optimizer.lr=nan must lie in [0, inf)."],
    "--config.eval_batches=0": ["eval_batches=0 must lie in [1, inf)."],
    "--config.eval_every=-3": ["eval_every=-3 must lie in [0, inf)."],
    "--config.steps=0": ["steps=0 must lie in [1, 2147483647]."],
    "--config.data.rows=-8": ["data.rows=-8 must lie in [1, inf)."],
    "--config.data.drop=(0.5,0.2)": ["data.drop=(0.5, 0.2) must be in order. Give (0.2, 0.5)."],
    "--config.data.drop=(0.5,)": ["data.drop=(0.5,) has 1 numbers. Give 2."],
    "--config.data.fps=(8.0,'x')": ["data.fps=(8.0, 'x') must lie in (0, inf)."],
    "--config.model.patch=(1,8.5,8)": ["model.patch=(1, 8.5, 8) must lie in whole numbers [1, inf)."],
    "--config.model.depth=0": ["model.depth=0 must lie in [1, inf)."],
    "--config.model.heads=5": ["model.width=192 must be a multiple of model.heads=5. Nearest: 195."],
    "--config.model.attention_pattern=('all','space','time')": ["model.depth=4 must be a multiple of the 3 layers"],
    "--config.model.text=none": ["model.text_pool=True pools a text, and model.text='none' has none."],
    "--config.mesh.data=0": ["mesh.data=0 must be -1, all devices that the other axes leave, or lie in [1, inf)."],
    "--config.data.shards=2": ["data.rows=9 must be a multiple of data.shards=2. Nearest: 10."],
    "--config.text.heads=7": ["text.width=128 must be a multiple of text.heads=7. Nearest: 133."],
    "--config.flow.late_mixture.ends=0.95": ["flow.late_mixture's shares sum to 1.05. Give shares that sum to 1 at"],
    "--config.flow.mixture.first=1.5": ["flow.mixture.first=1.5 must lie in [0, 1]."],
    "--config.sample.prompts=('48x32@8: a',)": ["sample.prompts: '48x32@8: a' is not of the form '48x32x9@8: a red"],
}


def refusals(given):
    """What the train command did with each list of flags: see `tests/refusals.py`."""
    command = [sys.executable, ROOT / "tests" / "refusals.py", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refuse_all():
    """AssertionError unless all of WRONG is refused as it should be; the seconds that the slowest took."""
    found = refusals([[*TRAIN, flag] for flag in WRONG])
    for (flag, words), one in zip(WRONG.items(), found, strict=True):
        assert one["code"] in (1, 2) and not one["jax"] and one["seconds"] < 10, (flag, one)
        assert "Traceback" not in one["said"] and len(one["said"].splitlines()) <= 3, (flag, one)
        assert all(word in one["said"] for word in words), (flag, one)
    return max(one["seconds"] for one in found)


def test_wrong_training_flags():
    """One clear line each, before jax is loaded."""
    assert len(WRONG) >= 30
    refuse_all()
    assert not (ROOT / "nowhere").exists()


def test_right_training_flags():
    """What the test above says of wrong flags means something only if right ones are taken."""
    given = ["--config.model.text=cross", "--config.model.attention_pattern=('space','time')", "--config.steps=1"]
    found = refusals([[*TRAIN, *given], TRAIN])
    assert [(one["code"], one["said"]) for one in found] == [(0, "not refused")] * 2


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_commands_themselves(tmp_path, command):
    """Each whole, once: a value that is none is one line, and nothing is begun."""
    where = f"--workdir={tmp_path / 'run'}" if command == "train" else "--topology=cpu:1"
    given = ["--config=configs/shapes.py", where, "--config.model.remat=ful"]
    command = [sys.executable, "-X", "importtime", "-m", f"dit_video.{command}", *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    wanted = "ValueError: model.remat='ful' is not known. Did you mean 'full'? Allowed: 'none', 'dots', 'full'."
    assert (done.returncode, done.stdout, said) == (1, "", [wanted])
    assert not any(line.endswith("| jax") for line in done.stderr.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tokens", ["-5", "0", "nan"])
def test_a_plan_for_no_patches_is_refused(tokens):
    given = ["--config=configs/shapes.py", "--topology=cpu:1", f"--tokens={tokens}"]
    command = [sys.executable, "-m", "dit_video.plan", *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert f"flag --tokens={float(tokens)}: must be a number above 0." in done.stderr


# Any text, file, or truth value will do for these; the form of the prompts is looked at by itself.
FREE = {
    *("name", "init_from", "data.root", "data.large", "codec.weights", "text.file", "text.encoder"),
    *("model.text_norm", "model.text_pool", "lora.init_from", "optimizer.offload", "sample.prompts"),
}


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else (f"{prefix}{name}",)


def test_every_key_says_what_it_may_be():
    """Once, and no key that there is not."""
    named = [*WORDS, *(name for names in INTERVALS.values() for name in names.split()), *FREE]
    assert sorted(named) == sorted(keys(base.get_config()))


def said_of(config):
    try:
        check_config(config)
    except ValueError as error:
        return str(error)
    return ""


def test_every_number_has_ends():
    """Just outside of its interval each number is refused by its name; at the ends that belong to it none is."""
    for interval, names in INTERVALS.items():
        low, high = map(float, interval[1:-1].split(","))
        ends = {
            low: interval[0] == "[",
            low - 1: False,
            high + 1: False,
            high: interval[-1] == "]",
            float("nan"): False,
        }
        for name in names.split():
            for number, belongs in ends.items():
                said = said_of(changed(name, number))
                assert (said.startswith(f"{name}=") and "must lie in" in said) != belongs, (name, number, said)


def changed(name, number):
    """base's config with a number in the place of one of this key's, whatever its type."""
    config, number = base.get_config(), int(number) if number.is_integer() else number
    *path, last = name.split(".")
    part = config
    for key in path:
        part = part[key]
    value = (number, *part[last][1:]) if isinstance(part[last], tuple) else number
    with part.ignore_type():
        part[last] = value
    return config


SHIPPED = (
    *(shapes.get_config(form) for form in ("long", "quick", "tasks")),
    *(clips.get_config(), base.get_config(), dit.get_config(), sit.get_config()),
    *(latte.get_config(), latte.get_config("S/2:101")),
    *(scale.get_config(form) for form in scale.SIZES),
    *(wan.get_config(form) for form in wan.SIZES),
)


@pytest.mark.parametrize("config", SHIPPED, ids=lambda config: config.name)
def test_the_shipped_configs_are_taken(config):
    check_config(config)


def test_every_word_is_one_that_the_code_knows():
    """Each word that the table allows occurs, quoted, outside of it; so no word is there that nothing reads."""
    sources = [path for path in (ROOT / "dit_video").rglob("*.py") if path.name != "allowed.py"]
    text = "\n".join(pathlib.Path(path).read_text() for path in sources)
    unread = [(name, word) for name, words in WORDS.items() for word in words if f'"{word}"' not in text]
    assert unread == [("model.dtype", "float16")], unread
