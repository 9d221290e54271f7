"""Several processes train as one: the same losses, one stop for all, and none that goes on, or waits, without another.

Real processes of one CPU device each, joined over the loopback by the flags of the train command.
"""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import test_resume as resume
from test_resume import RUN, children, complete, left_by, writing
from test_trainer import TINY, Poisoned, assert_close, tiny

from dit_video import generate, trainer
from dit_video.checkpoint import Checkpoints, digest, load
from dit_video.metrics import read_metrics
from dit_video.sharding import make_mesh
from dit_video.step import make_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHED = (ROOT / "tests" / "cached.py",)
BARE = {"eval_every": 0}  # where no validation is tested
ENDS = 30  # seconds within which the others must have ended, once one is dead


def start(workdir, count=2, program=CACHED, own=None, folders=None, **overrides):
    """The train command (`cached.py`), `count` times, and `own` flags {I: [...]}; what each prints: WORKDIR.I.log.

    folders: {I: where process I is started}, as hosts have each its own disk under the same paths.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        joined = [f"--coordinator=localhost:{probe.getsockname()[1]}", f"--num_processes={count}"]
    flags = [f"--config.{key}={value}" for key, value in (TINY | RUN | overrides).items()]
    command = [sys.executable, *program, f"--config={ROOT}/configs/shapes.py", f"--workdir={workdir}", *flags]
    processes = []
    for i in range(count):
        more = ([*joined, f"--process_id={i}"] if count > 1 else []) + (own or {}).get(i, [])
        with open(f"{workdir}.{i}.log", "a") as log:
            env = os.environ | {"XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
            cwd = (folders or {}).get(i, ROOT)
            processes.append(subprocess.Popen([*command, *more], env=env, cwd=cwd, stdout=log, stderr=log))
    return processes


def ended(processes, seconds=1800):
    """Their exit codes; AssertionError for one that goes on for longer."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"a process went on for more than {seconds} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()


def printed(workdir, i):
    return pathlib.Path(f"{workdir}.{i}.log").read_text()


def finish(workdir, count=2, **overrides):
    assert ended(start(workdir, count, **overrides)) == [0] * count, printed(workdir, 0)


def when(processes, condition):
    """Until the condition holds, or a process has ended."""
    while all(process.poll() is None for process in processes) and not condition():
        time.sleep(0.005)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run of one process leaves on as many devices: the same, bit for bit, as a sum of two has no order."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    code, said = resume.finish(workdir, devices=2, **BARE)
    assert code == 0, said
    return left_by(workdir)


MOMENTS = {
    "compilation": lambda workdir: "from step" in printed(workdir, 0),
    "step": lambda workdir: complete(workdir) >= 3,
    "save": lambda workdir: complete(workdir) >= 3 and writing(workdir),
    "evaluation": lambda workdir: complete(workdir) >= 3,
}


def preempt(workdir, role, asked=signal.SIGTERM, moment="step", **overrides):
    """A signal to one of two processes, at one of MOMENTS; the step that both have saved."""
    if moment == "evaluation":  # nearly all of the time, then
        overrides |= {"eval_every": 1, "eval_batches": 10}
    both = start(workdir, **overrides)
    when(both, lambda: MOMENTS[moment](workdir))
    both[role].send_signal(asked)
    assert ended(both) == [75, 75], printed(workdir, role)
    stopped = complete(workdir)
    assert (3 if moment != "compilation" else 0) < stopped < 32 and not writing(workdir)
    said = (f"saved at step {stopped}", "elapsed")  # by the first alone
    assert [all(words in printed(workdir, i) for words in said) for i in (0, 1)] == [True, False]
    assert not any(words in printed(workdir, 1) for words in said)
    return stopped


def stall(workdir, **overrides):
    """Stops one of two processes without killing it, in a step; how many seconds later the other had ended."""
    before, log = complete(workdir), pathlib.Path(f"{workdir}.0.log")
    said = log.stat().st_size if log.exists() else 0
    both = start(workdir, **overrides)
    when(both, lambda: complete(workdir) > before)
    both[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert ended(both[:1], ENDS)[0] != 0
        seconds = time.monotonic() - began
    finally:
        both[1].kill()
        both[1].wait()
    assert "stopped sending heartbeats):\n1\n" in printed(workdir, 0)[said:], printed(workdir, 0)[said:]
    return seconds


def test_one_of_two_is_stopped_dies_or_stalls(tmp_path, unbroken):
    """SIGTERM to one: both save the same step and end with 75. SIGKILL of one: the other ends too.

    SIGSTOP of one, which no longer runs, but is not dead: its heartbeat is missed, and the other names it and ends.
    After each the same commands go on; nothing is lost.
    """
    workdir = tmp_path / "run"
    stopped = preempt(workdir, 1, **BARE)
    both = start(workdir, **BARE)
    when(both, lambda: complete(workdir) > stopped)
    both[1].kill()
    assert ended(both[:1], ENDS)[0] != 0
    stall(workdir, **BARE)
    finish(workdir, **BARE)
    assert left_by(workdir) == unbroken


DEATHS = {
    "step": lambda workdir: complete(workdir) >= 6 and not writing(workdir),
    "save": lambda workdir: complete(workdir) >= 6 and writing(workdir),
    "restore": lambda workdir: "from step" in printed(workdir, 0),
}


def die(workdir, role, moment, **overrides):
    """Kills one of two processes at one of DEATHS; how many seconds later the other had ended."""
    if moment == "restore":
        both = start(workdir, **overrides)
        when(both, lambda: complete(workdir) >= 6)
        both[0].send_signal(signal.SIGTERM)
        assert ended(both) == [75, 75], printed(workdir, 0)
        for i in (0, 1):
            pathlib.Path(f"{workdir}.{i}.log").write_text("")
    both = start(workdir, **overrides)
    when(both, lambda: DEATHS[moment](workdir))
    both[role].kill()
    began = time.monotonic()
    assert ended([both[1 - role]], ENDS)[0] != 0
    both[role].wait()
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("moment", DEATHS)
def test_a_dead_peer_ends_the_run(tmp_path, unbroken, role, moment):
    """The other exits non-zero within 30 s, wherever it is; both started again leave what an unbroken run leaves."""
    die(tmp_path / "run", role, moment, **BARE)
    finish(tmp_path / "run", **BARE)
    assert left_by(tmp_path / "run") == unbroken


def on_other_devices(folder):
    """A run on 8, 4, 1, 8 devices and one on two processes, then one: how far losses come to lie from a run on one.

    The clips and the loader's state at the end are the same, or AssertionError.
    """
    rest = {"data.rows": 8, "optimizer.lr": 3e-4}
    assert resume.finish(folder / "one", **rest)[0] == 0
    wanted, largest = left_by(folder / "one"), 0.0
    for name, places in {"devices": (8, 4, 1, 8), "processes": ("two", 1)}.items():
        run = folder / name
        for i, place in enumerate(places):
            run_here = start(run, **rest) if place == "two" else [resume.start(run, place, **rest)]
            if i < len(places) - 1:
                before = complete(run)
                when(run_here, lambda run=run, before=before: complete(run) > before)
                run_here[0].send_signal(signal.SIGTERM)
            assert set(ended(run_here)) == ({75} if i < len(places) - 1 else {0}), f"{name}: {place}"
        found = left_by(run)
        assert found["extra"] == wanted["extra"] and len(found["lines"]) == len(wanted["lines"])
        for line, want in zip(found["lines"], wanted["lines"]):
            assert line.keys() == want.keys() and line.get("clips") == want.get("clips"), (line, want)
            largest = max([largest, *(abs(line[k] / want[k] - 1) for k in ("loss", "validation") if k in want)])
    return largest


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(tmp_path):
    """Losses after 32 steps within 1e-3 of those of one device (sums are ordered otherwise), on the same clips."""
    assert on_other_devices(tmp_path) < 1e-3


class Stopped(Poisoned):
    """A loader at which, asked for the batch after step `steps`, its own process gets a SIGTERM."""

    def __next__(self):
        if self.step == self.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        self.step += 1
        return next(self.loader)


def train_until(step, config, workdir):
    """Trains here, on all eight devices, until after that step a SIGTERM comes; the lines of metrics so far."""
    with pytest.MonkeyPatch.context() as patch:
        make, more = trainer.make_loader, step - complete(workdir)
        patch.setattr(trainer, "make_loader", lambda *args: Stopped(make(*args), more))
        with pytest.raises(trainer.Preempted):
            trainer.train(config, workdir)
    assert complete(workdir) == step
    return read_metrics(workdir / "metrics.jsonl")


def test_a_run_moves_from_eight_devices_to_one_and_back(tmp_path):
    """What is restored is what was saved, bit for bit; the clips are those of an unbroken run, and losses within 1e-4.

    On the eight the state lies cut along fsdp.
    """
    rest = RUN | {"data.rows": 8, "optimizer.lr": 3e-4, "steps": 100, "eval_every": 0, "log_every": 1}
    config, run, whole = tiny(rest | {"mesh.fsdp": 4}), tmp_path / "run", tmp_path / "whole"
    train_until(2, config, run)
    alone = resume.start(run, 1, **rest)
    when([alone], lambda: complete(run) > 2)
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(60) == trainer.EXIT_PREEMPTED and complete(run) > 2, (tmp_path / "run.log").read_text()
    mesh = make_mesh(config.mesh)
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(trainer.abstract_state(make_run(config, mesh), mesh)).state
        assert len(restored.params["dit"]["block_q"].sharding.device_set) == 8
        assert digest(restored) == digest(checkpoints.restore().state)
    last = complete(run) + 2
    lines, wanted = (train_until(last, config, workdir) for workdir in (run, whole))
    extra, same = (load(workdir / "checkpoints", "ema").extra for workdir in (run, whole))
    assert extra == same and len(lines) == len(wanted) == last
    for line, want in zip(lines, wanted):
        assert (line["step"], line["clips"]) == (want["step"], want["clips"])
        np.testing.assert_allclose(line["loss"], want["loss"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_of_two_is_stopped_at_any_moment(tmp_path, unbroken, moment):
    """By either signal; both save the same step, and go on from there as if nothing had happened."""
    for role, asked in ((0, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGINT), (0, signal.SIGTERM)):
        workdir = tmp_path / f"{asked.name}{role}"
        preempt(workdir, role, asked, moment)
    more = {"eval_every": 1, "eval_batches": 10} if moment == "evaluation" else {}
    finish(workdir, **more)
    assert left_by(workdir)["state"] == unbroken["state"]


@pytest.mark.slow
def test_a_failure_of_one_ends_all(tmp_path):
    """One whose decoding worker dies says so and ends; the other, which waits for it in the step, ends within 30 s."""
    workdir = tmp_path / "run"
    both = start(workdir, **{"data.workers": 1, "steps": 100_000, "keep": 1})
    when(both, lambda: complete(workdir) >= 3)
    os.kill(children(both[1])[0], signal.SIGKILL)
    codes = ended(both, ENDS)
    assert codes[1] == 1 and codes[0] != 0
    reason = "process 1, .* ends the run. RuntimeError: Worker process was terminated unexpectedly"
    assert all(re.search(reason, printed(workdir, process)) for process in (0, 1))
    assert re.match(reason, (workdir / "failed.txt").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, {}), (2, {"mesh.fsdp": 2}), (4, {"mesh.fsdp": 2, "mesh.sequence": 2})])
def test_processes_train_as_one(tmp_path, count, mesh):
    """The losses of one process on the same global batch, line for line, and the same weights at the end (1e-4).

    Each reads its own shards of the data alone; where a row is cut, the processes that share it read the same.
    """
    rest = {"steps": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 2}
    finish(tmp_path / "one", 1, **rest)
    finish(tmp_path / "more", count, **rest, **mesh)
    wanted, lines = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "more"))
    same = lambda name: name.startswith(("loss", "validation", "gradient_norm", "clips", "patch_fill", "text_fill"))
    assert len(lines) == len(wanted) == 6
    for line, want in zip(lines, wanted, strict=True):
        assert line["step"] == want["step"] and line.keys() == want.keys()
        for name in filter(same, want):
            np.testing.assert_allclose(line[name], want[name], rtol=1e-4, err_msg=f"{name} at step {want['step']}")
    # The checkpoint, gathered from all, and the file of weights are there for anyone to sample from.
    one, more = (generate.load(tmp_path / name) for name in ("one", "more"))
    assert_close(more.params, one.params, 1e-4)
    assert_close(generate.load(tmp_path / "more" / "weights.safetensors").params, more.params, 1e-2)
    # And the run of several goes on as one.
    finish(tmp_path / "more", 1, **rest | {"steps": 5})
    lines = read_metrics(tmp_path / "more" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
