"""A run that is killed or stopped, whenever, and started again leaves what an unbroken run leaves, bit for bit."""

import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import held
import pytest
from test_trainer import TINY

from dit_video.checkpoint import SUMS, Checkpoints, digest
from dit_video.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lines of metrics span checkpoints, and validation falls between them.
RUN = {
    "optimizer.kind": "adamw",
    "optimizer.warmup": 3,
    "steps": 32,
    "log_every": 4,
    "checkpoint_every": 3,
    "eval_every": 8,
}
TIMINGS = {"tokens_per_second", "model_flops_per_second", "share_of_matmul_peak", "compilations"}
TRAIN = ("-m", "dit_video.train")


def start(workdir, devices=1, program=TRAIN, environment=None, **overrides):
    """The train command on so many devices of the host; what it prints goes to WORKDIR.log."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | RUN | overrides).items()]
    command = [sys.executable, *program, "--config=configs/shapes.py", f"--workdir={workdir}", *flags]
    with open(f"{workdir}.log", "a") as log:
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONUNBUFFERED": "1"}
        env |= environment or {}
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)


def finish(workdir, **overrides):
    """Runs the command to its end; gives its exit code and what it printed."""
    log = pathlib.Path(f"{workdir}.log")
    before = log.stat().st_size if log.exists() else 0
    code = start(workdir, **overrides).wait(600)
    return code, log.read_text()[before:]


def left_by(workdir):
    """All that must not depend on how often a run was stopped."""
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir / "metrics.jsonl")]
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step, state, extra, config = checkpoints.restore()
    files = [workdir / "weights.safetensors", *sorted((workdir / "gallery").glob("step_*/*.png"))]
    return {
        "lines": lines,
        "step": step,
        "state": digest(state),
        "extra": extra,
        "config": config,
        "files": {str(path.relative_to(workdir)): path.read_bytes() for path in files},
    }


def assert_same(workdir, unbroken):
    found = left_by(workdir)
    assert found["lines"] == unbroken["lines"]
    assert found["state"] == unbroken["state"]
    assert found == unbroken
    for kind in ("loss", "validation"):
        steps = [line["step"] for line in found["lines"] if kind in line]
        assert steps == list(range(0, 33, {"loss": 4, "validation": 8}[kind]))[1:]


def complete(workdir):
    """The newest complete checkpoint's step."""
    return max((int(path.parent.name) for path in workdir.glob(f"checkpoints/*/{SUMS}")), default=0)


def writing(workdir):
    """Whether a checkpoint is half written at this moment."""
    return any(not (path / SUMS).exists() for path in workdir.glob("checkpoints/*"))


def wait_until(process, workdir, step, condition=lambda: True):
    """Until the checkpoint of `step`, or a later one, is complete and `condition` holds, or the process has ended."""
    while process.poll() is None and not (complete(workdir) >= step and condition()):
        time.sleep(0.002)


def gone(pid):
    """Whether a process has ended; one that nobody has asked for its exit code yet counts."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def children(process):
    """The pids of a process's decoding workers."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")  # of whichever thread started them
    pids = [pid for task in tasks for pid in task.read_text().split()]
    return [int(pid) for pid in pids if "spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """A run that nothing happened to, with tokens in its environment, and what it left; made once for all workers."""
    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    workdir = session / "unbroken" / "run"
    workdir.parent.mkdir(exist_ok=True)
    with open(session / "unbroken.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "weights.safetensors").exists():
            code, printed = finish(workdir, environment=SECRETS)
            assert code == 0, printed
    return workdir, left_by(workdir)


def kill(folder, kills, seed, unbroken):
    """Kills runs so many times, wherever they are; the last one, and how many hit a half-written checkpoint.

    Only what SIGKILL has ended counts. A run that finishes before that must be as `unbroken`, and another begins. Of a
    run's kills the first falls anywhere in its start; of the rest every other one falls while a checkpoint is written,
    and one at a random moment after the run has got further.
    """
    rng, torn, done, runs, i = random.Random(seed), 0, 0, 1, 0
    while done < kills:
        run = folder / f"run{runs}"
        process, before = start(run), complete(run)
        if i == 0:
            time.sleep(rng.uniform(0, 4))
        elif i % 2:
            wait_until(process, run, before + 1, lambda run=run: writing(run))
            time.sleep(rng.uniform(0, 0.03) if i > 1 else 0)
        else:
            wait_until(process, run, min(before + 3 * rng.randint(0, 1 + 24 // kills), 30))
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        code = process.wait()
        if code == -signal.SIGKILL:
            done, torn, i = done + 1, torn + writing(run), i + 1
        else:
            assert code == 0, pathlib.Path(f"{run}.log").read_text()
            assert_same(run, unbroken)
            runs, i = runs + 1, 0
    assert torn >= kills // 4, f"{torn} of {kills} kills hit a half-written checkpoint: fewer than a quarter"
    return run, torn


def kill_and_resume(folder, kills, seed, unbroken):
    """`kill`, and lets the last run finish, which must be as `unbroken`; how many hit a half-written checkpoint."""
    run, torn = kill(folder, kills, seed, unbroken)
    code, printed = finish(run)
    assert code == 0, printed
    assert_same(run, unbroken)
    return torn


def stop(run):
    """SIGTERM: exit code 75 and a checkpoint at the very step, amid a line of metrics too."""
    process = start(run)
    wait_until(process, run, 6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    stopped = complete(run)
    assert f"saved at step {stopped}" in pathlib.Path(f"{run}.log").read_text()
    assert 6 <= stopped < 32 and not writing(run)
    extra = json.loads((run / "checkpoints" / f"{stopped:08d}" / "extra.json").read_text())
    assert len(extra["meter"]) == stopped % 4


def test_stopped_once_and_killed_five_times(tmp_path, unbroken):
    """Bit for bit, by the same command each time: stopped by a signal, then killed, in the middle of a checkpoint too.

    The fifth kill comes once the last checkpoint is complete: validation, gallery and weights are made all the same.
    """
    stop(tmp_path / "run1")
    run, _ = kill(tmp_path, 4, 0, unbroken[1])
    process = start(run)
    wait_until(process, run, 32)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "gallery" / "index.html").exists(), "the kill came too late: the test tests nothing"
    code, printed = finish(run)
    assert code == 0, printed
    assert_same(run, unbroken[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_many_times(tmp_path, unbroken, seed):
    """As often as two runs have checkpoints."""
    kill_and_resume(tmp_path, 20, seed, unbroken[1])


MOMENTS = {
    "compilation": lambda run: "from step" in pathlib.Path(f"{run}.log").read_text(),
    "step": lambda run: complete(run) >= 6,
    "save": lambda run: complete(run) >= 6 and writing(run),
    "evaluation": lambda run: complete(run) >= 6,
}


def stop_and_resume(folder, asked, moment, unbroken):
    """A signal at one of MOMENTS, and the same command again."""
    run, evaluating = folder / "run", moment == "evaluation"
    more = {"eval_every": 1, "eval_batches": 10} if evaluating else {}  # nearly all of the time, then
    process = start(run, **more)
    wait_until(process, run, 0, lambda: MOMENTS[moment](run))
    process.send_signal(asked)
    code = process.wait(60)
    assert code == 75, f"{asked.name} in {moment}: exit code {code}"
    assert complete(run) > 0 and not writing(run), f"{asked.name} in {moment}: not saved"
    assert finish(run, **more)[0] == 0
    if evaluating:  # more lines than the unbroken run's
        assert left_by(run)["state"] == unbroken["state"]
    else:
        assert_same(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_by_a_signal_at_any_moment(tmp_path, unbroken, asked, moment):
    stop_and_resume(tmp_path, asked, moment, unbroken[1])


def test_finished_runs_and_changed_configs(tmp_path, unbroken):
    """A finished run says so, touches nothing and ends; another config is refused, but steps may be raised."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    code, printed = finish(workdir)
    assert code == 0 and "is finished: 32 of 32 steps" in printed
    assert_same(workdir, unbroken[1])
    other = {"optimizer.lr": 0.5, "model.depth": 1, "data.rows": 4, "data.max_tokens": 96, "log_every": 5}
    code, printed = finish(workdir, **other)
    assert code == 1 and "Traceback" not in printed and "another config" in printed
    for change in (
        "optimizer.lr: 0.002 -> 0.5",
        "model.depth: 2 -> 1",
        "data.rows: 2 -> 4",
        "data.max_tokens: 128 -> 96",
    ):
        assert change in printed
    assert "log_every" not in printed
    assert_same(workdir, unbroken[1])
    allowing = {"program": (*TRAIN, "--allow_changed=optimizer.lr,model.width")}
    code, printed = finish(workdir, **allowing, **{"model.width": 48})
    assert code == 1 and "Traceback" not in printed
    assert "holds another state" in printed and re.search(r"\[.*32.*\] saved, .*\[.*48.*\] wanted", printed), printed
    assert_same(workdir, unbroken[1])
    changed = {"steps": 36, "optimizer.lr": 1e-3, "optimizer.accumulate": 2, "eval_every": 0}
    code, printed = finish(workdir, **allowing, **changed)
    assert code == 0 and "from step 32 to 36" in printed and complete(workdir) == 36
    assert "ALLOWED TO CHANGE" in printed and "optimizer.accumulate: 1 -> 2 orders sums otherwise" in printed
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line][-2:] == [32, 36]


NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "PASSWORD")
SECRETS = {name: f"planted-{name.lower()}-9f2c71" for name in NAMES}


def with_secret(folder):
    """The files below a folder that hold what was planted in the environment."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS.values())
    ]


def count_without_secret(folder):
    """How many files a run has left below a folder; AssertionError where one has a token."""
    left = [path for path in folder.rglob("*") if path.is_file()]
    names = {"config.json", "versions.json", "extra.json", "metrics.jsonl", "run.log", "index.html"}
    assert names <= {path.name for path in left} and not with_secret(folder), with_secret(folder)
    return len(left)


def keep_secrets(folder):
    """A run with tokens in its environment, and one that fails with a traceback; how many files they left, without."""
    assert start(folder / "run", environment=SECRETS).wait(600) == 0
    (folder / "failed" / "metrics.jsonl").mkdir(parents=True)  # a folder where a file must be
    assert start(folder / "failed", environment=SECRETS).wait(600) == 1
    assert "Traceback" in pathlib.Path(folder / "failed.log").read_text()
    return count_without_secret(folder)


def test_secrets_of_the_environment_are_left_nowhere(tmp_path, unbroken):
    """In no config, log, checkpoint or page; a file with one would be found."""
    count_without_secret(unbroken[0].parent)
    (tmp_path / "note.txt").write_text(f"the token is {SECRETS['HF_TOKEN']}.")
    assert with_secret(tmp_path) == ["note.txt"]


def memory_of(pids):
    """How the names of the shared memory that processes have in use begin: as their loader's do, and no other's."""
    maps = "".join(pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return tuple({*re.findall(r"/dev/shm/(\w+_)", maps)})


def kill_worker(workdir):
    """Kills one of a run's two decoding workers; how many seconds later the run had ended.

    With the reason; the other worker is gone, and no shared memory left.
    """
    process = start(workdir, environment=SECRETS, **{"data.workers": 2})
    wait_until(process, workdir, 3)
    workers, own = children(process), ()
    while not own:
        own = memory_of([process.pid, *workers])
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    began = time.monotonic()
    code, printed = process.wait(60), pathlib.Path(f"{workdir}.log").read_text()
    seconds = time.monotonic() - began
    assert code == 1 and "terminated unexpectedly with exit code -9" in printed, printed
    memory = lambda: [name for name in os.listdir("/dev/shm") if name.startswith(own)]
    left = lambda: [pid for pid in workers if not gone(pid)] + memory()
    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left(), f"processes or shared memory are left: {left()}"
    return seconds


def finish_with_workers(workdir, unbroken):
    """Goes on with that run; AssertionError unless it leaves what `unbroken`, with threads, has left."""
    code, printed = finish(workdir, **{"data.workers": 2})
    assert code == 0, printed
    # The config, which the file of weights holds too, says who read the data; the state has the weights as well.
    pictures = lambda left: {name: file for name, file in left["files"].items() if name != "weights.safetensors"}
    without = lambda left: left | {"config": 0, "files": pictures(left)}
    assert without(left_by(workdir)) == without(unbroken), "another outcome than an unbroken run's"


def test_a_killed_worker_ends_the_run(tmp_path, unbroken):
    """It says so, without a token of its environment in the traceback; the same command then loses nothing."""
    kill_worker(tmp_path / "run")
    assert "Traceback" in (tmp_path / "run.log").read_text() and not with_secret(tmp_path), with_secret(tmp_path)
    finish_with_workers(tmp_path / "run", unbroken[1])


def resources(workdir, steps, **overrides):
    """What a run of so many steps holds after a fifth of them, and near the end.

    The median of five looks each: rows made ahead may have just been used up.
    """
    part, out = steps // 20, pathlib.Path(f"{workdir}.held.jsonl")
    every = {"log_every": part, "checkpoint_every": part, "eval_every": part}
    process = start(workdir, 1, (ROOT / "tests" / "held.py", out), held.ENVIRONMENT, steps=steps, **every, **overrides)
    assert process.wait() == 0, pathlib.Path(f"{workdir}.log").read_text()
    looks = [json.loads(line) for line in out.read_text().splitlines()]
    median = lambda part, name: statistics.median(look[name] for look in part)
    return [{name: median(part, name) for name in part[0]} for part in (looks[2:7], looks[14:19])]


def flat(early, late):
    most = {"MB in use": 8, "MB resident": 30, "files": 2, "threads": 2}
    return all(late[name] <= early[name] + more for name, more in most.items())


def test_a_longer_run_holds_no_more(tmp_path):
    """Memory, open files and threads after 80 steps and after 320. (10,000 steps: experiments/faults.)"""
    early, late = resources(tmp_path / "run", 400, **{"data.rows": 1, "data.shards": 1})
    assert flat(early, late), (early, late)
