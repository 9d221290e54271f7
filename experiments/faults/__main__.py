"""python -m experiments.faults --kills=200 --flips=300 --steps=10000 [--only=kills,flips]

Puts a tiny run through every fault of training, checkpoints and processes that it can make itself, and writes the table
of README.md. Exits with 1 where something was lost. The full count takes hours of one core; --kills=10 --flips=300
--steps=1000 --peers=1 a quarter of one. What counts as "nothing lost" is what the tests hold a run to: their functions
do it here, more often.
"""

import collections
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
from absl import app, flags, logging

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the quick forms of the same faults

import conftest  # noqa: E402, F401  eight devices of the host, for what the tests' modules make of them
import test_processes as processes  # noqa: E402
import test_resume as resume  # noqa: E402
from test_checkpoint import files_of, flip, spoil  # noqa: E402

from dit_video.checkpoint import find_damage  # noqa: E402

KILLS = flags.DEFINE_integer("kills", 200, "kill -9 of one process.")
FLIPS = flags.DEFINE_integer("flips", 300, "Single bits of a checkpoint.")
PEERS = flags.DEFINE_integer("peers", 5, "Deaths of one of two processes, for each role and moment.")
STEPS = flags.DEFINE_integer("steps", 10_000, "Steps of the long run.")
ONLY = flags.DEFINE_list("only", [], "Some of the faults, by their names in FAULTS; README.md is then left as it is.")

HEAD = """# What is lost when something breaks?

    {command}

{where}, {seconds:.0f} s. The run is tiny: 32 steps, a checkpoint every third, validation every eighth, a line of
metrics every fourth. "The same" means: every logged loss, parameters, averages, optimizer, the loader's state, the
pictures and the file of weights, bit for bit those of a run that nothing happened to.

| fault | how often | outcome |
|---|---|---|
"""


def kills(unbroken, folder):
    """kill -9 at any moment, every other one while a checkpoint is being written."""
    torn, rounds = 0, [min(20, KILLS.value - done) for done in range(0, KILLS.value, 20)]
    for seed, count in enumerate(rounds):
        torn += resume.kill_and_resume(folder / f"run{seed}", count, seed)
        resume.assert_same(folder / f"run{seed}", unbroken[1])
        shutil.rmtree(folder / f"run{seed}")
    return KILLS.value, f"{KILLS.value} resumed, the same; {torn} of them had hit a half-written checkpoint"


def signals(unbroken, folder):
    """SIGTERM and SIGINT in compilation, step, save and evaluation."""
    moments = {
        "compilation": lambda run: "from step" in log_of(run),
        "step": lambda run: resume.complete(run) >= 6,
        "save": lambda run: resume.complete(run) >= 6 and resume.writing(run),
        "evaluation": lambda run: resume.complete(run) >= 6,
    }
    for asked in (signal.SIGTERM, signal.SIGINT):
        for moment, condition in moments.items():
            run, evaluating = folder / f"{asked.name}-{moment}", moment == "evaluation"
            more = {"eval_every": 1, "eval_batches": 10} if evaluating else {}  # nearly all of the time, then
            process = resume.start(run, **more)
            processes.when([process], lambda run=run, condition=condition: condition(run))
            process.send_signal(asked)
            code = process.wait(120)
            assert code == 75, f"{asked.name} in {moment}: exit code {code}"
            assert resume.complete(run) > 0 and not resume.writing(run), f"{asked.name} in {moment}: not saved"
            assert resume.finish(run)[0] == 0
            if evaluating:  # more lines than the unbroken run's
                assert resume.left_by(run)["state"] == unbroken[1]["state"]
            else:
                resume.assert_same(run, unbroken[1])
    return 2 * len(moments), "all saved the step they were in and ended with 75; resumed, the same"


def flips(unbroken, folder):
    """Single bits flipped, over all files of a checkpoint."""
    checkpoint = copy_of(unbroken, folder) / "checkpoints" / f"{32:08d}"
    files, rng = files_of(checkpoint), random.Random(0)
    places = [*files, *rng.choices(files, k=max(FLIPS.value - len(files), 0))][: FLIPS.value]
    for path in places:
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        damage = find_damage(checkpoint)
        assert len(damage) == 1 and damage[0].startswith(f"{path} "), f"bit {bit} of {path}: {damage}"
        flip(path, bit)
    return len(places), f"{len(places)} found, each file named"


def missing(unbroken, folder):
    """Each file deleted, emptied, cut by a byte, lengthened by one."""
    checkpoint = copy_of(unbroken, folder) / "checkpoints" / f"{32:08d}"
    count = 0
    for path in files_of(checkpoint):
        content = path.read_bytes()
        for bad in (None, b"", content[:-1], content + b"\0"):
            path.unlink() if bad is None else path.write_bytes(bad)
            damage = find_damage(checkpoint)
            assert len(damage) == 1 and damage[0].startswith(f"{path} "), f"{path}: {damage}"
            path.write_bytes(content)
            count += 1
    return count, f"{count} found, each file named"


def fallback(unbroken, folder):
    """The newest checkpoint bad, the newest two, all of them; then the same command."""
    for bad in (1, 2):
        run = copy_of(unbroken, folder / str(bad))
        steps = sorted(run.glob("checkpoints/*"), reverse=True)
        spoilt = [spoil(path) for path in steps[:bad]]
        code, printed = resume.finish(run)
        assert code == 0 and all(str(path) in printed for path in spoilt), printed
        assert f"from step {int(steps[bad].name)} " in printed, printed
        resume.assert_same(run, unbroken[1])
    run = copy_of(unbroken, folder / "all")
    for path in run.glob("checkpoints/*"):
        spoil(path)
    code, printed = resume.finish(run)
    assert code == 1 and "are all damaged" in printed and "Traceback" not in printed, printed
    return 3, "the next older one, the bad files named, the same at the end; all bad: exit code 1, nothing begun"


def disk(unbroken, folder):
    """A file system that fills up while the run goes on, and is freed; the same command."""
    small = folder / "disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        return 0, f"not tried: {mounted.stderr.strip()}"
    try:
        run, ballast = small / "run", small / "ballast"
        process = resume.start(run)
        processes.when([process], lambda: resume.complete(run) >= 6)
        ballast.write_bytes(b"x" * max(os.statvfs(small).f_bavail * 4096 - 50_000, 0))
        assert process.wait(120) == 1, "the run went on over a full disk"
        printed = log_of(run)
        assert re.search("could not be (written|begun)|No space left", printed), printed[-2000:]
        assert resume.complete(run) >= 6
        ballast.unlink()
        assert resume.finish(run)[0] == 0
        resume.assert_same(run, unbroken[1])
    finally:
        subprocess.run(["umount", small], check=True)
    return 1, "exit code 1 and the reason; the checkpoints before it sound; resumed once there was space, the same"


def peers(unbroken, folder):
    """SIGKILL of one of two processes, each role, in step, save and restore."""
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    processes.finish(whole)
    wanted, slowest = resume.left_by(whole), 0.0
    for i in range(PEERS.value):
        for role in (0, 1):
            for moment in processes.MOMENTS:
                run = folder / f"run{i}{role}{moment}"
                slowest = max(slowest, processes.die(run, role, moment))
                processes.finish(run)
                assert resume.left_by(run) == wanted, f"role {role}, {moment}: another outcome"
                shutil.rmtree(run)
    count = PEERS.value * 2 * len(processes.MOMENTS)
    return count, f"the other had ended after {slowest:.1f} s at most; both resumed, the same as an unbroken run of two"


def devices(unbroken, folder):
    """A run on 8, then 4, 1, 8 devices, and one in two processes that goes on in one."""
    largest = processes.on_other_devices(folder)
    return 2, f"resumed each time; losses at most {largest:.1e} (relative) from those of an unbroken run"


def long(unbroken, folder):
    """A run of many steps: resident memory, open files and threads early and late."""
    early, late = resume.resources(folder / "run", STEPS.value)
    words = ", ".join(f"{name} {early[name]} -> {late[name]}" for name in early)
    assert resume.flat(early, late), words
    return 1, f"{STEPS.value} steps: {words}"


FAULTS = {f.__name__: f for f in (kills, signals, flips, missing, fallback, disk, peers, devices, long)}


def copy_of(unbroken, folder):
    run = folder / "run"
    shutil.copytree(unbroken[0], run)
    return run


def log_of(run):
    return text_of(pathlib.Path(f"{run}.log"))


def text_of(path):
    return path.read_text() if path.exists() else ""


def main(_):
    logging.set_verbosity(logging.WARNING)
    began, rows, lost = time.monotonic(), [], collections.Counter()
    with tempfile.TemporaryDirectory() as top:
        workdir = pathlib.Path(top) / "unbroken" / "run"
        workdir.parent.mkdir()
        code, printed = resume.finish(workdir)
        assert code == 0, printed
        unbroken = workdir, resume.left_by(workdir)
        for name in ONLY.value or FAULTS:
            folder, fault = pathlib.Path(top) / name, FAULTS[name]
            folder.mkdir()
            try:
                count, outcome = fault(unbroken, folder)
            except AssertionError as error:
                count, outcome = "-", f"LOST: {' '.join(str(error).split())[:500]}"
                lost[name] += 1
            rows.append(f"| {' '.join(fault.__doc__.split())} | {count} | {outcome} |")
            print(rows[-1], flush=True)
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    head = HEAD.format(
        command=" ".join(["python -m experiments.faults", *sys.argv[1:]]), where=where, seconds=time.monotonic() - began
    )
    if not ONLY.value:
        (HERE / "README.md").write_text(head + "\n".join(rows) + "\n")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    app.run(main)
